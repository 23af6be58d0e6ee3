"""The metadata of one step. A cached op asks for any of it by naming an argument so.

T packed tokens, B sequences, P pages a sequence, R wanted rows. Int32 device tensors unless said. Sequences that decode
one token come first. T may exceed `cu_seqlens[B]` and B the live sequences: padded tokens and sequences point at page 0
and slot 0, and a padded sequence has `query_lens` 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

FIELDS: Mapping[str, str] = {
    "positions": "[T] int64: the token's position in its sequence",
    "cu_seqlens": "[B+1]: sequence b holds tokens cu_seqlens[b] to cu_seqlens[b+1]",
    "query_lens": "[B]: tokens of the sequence in this step",
    "context_lens": "[B]: tokens cached before this step",
    "seq_lens": "[B]: context_lens + query_lens",
    "page_table": "[B, P]: pages of the sequence in order, of the resource's page group; 0 where freed or unused",
    "token_slots": "[T]: page * page_size + offset where the token's entry goes, of the resource's page group",
    "state_slots": "[B]: index of the sequence's state",
    "fresh": "[B] bool: first chunk of the sequence, its state starts at zero",
    "output_rows": "[R] int64: tokens whose logits are wanted",
}
"""New names may be added in a minor version of the contract; none changes meaning."""

GROUPED_FIELDS = frozenset({"page_table", "token_slots"})
"""Fields of which every page group (resources with an equal window) has its own."""


class BatchView(Protocol):
    """What `Kernel.prepare` sees of one step: host copies of the fields, those of its own page group among them.

    The counts are plain ints that only `prepare` and the choice of a bucket may read: a graph would bake them in.
    """

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_sequences(self) -> int: ...

    @property
    def num_decodes(self) -> int: ...

    @property
    def max_query_len(self) -> int: ...

    @property
    def max_seq_len(self) -> int: ...

    @property
    def page_size(self) -> int: ...

    def host(self, name: str) -> torch.Tensor:
        """The field as a CPU tensor, without padding. Not to be written."""
        ...
