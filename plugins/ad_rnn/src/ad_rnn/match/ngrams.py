"""Embeddings of the last few token ids, hashed: each id's predecessors are found by shifting ids, one token a shift."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ad_core.api.errors import CaptureError
from ad_core.graph.ops import find_op
from ad_core.graph.seams import Entered, ForwardSeam

if TYPE_CHECKING:
    import torch
    from torch import nn

OP = "ad_rnn::token_shift"
PARTS = "ngram_size heads_per_ngram eos_token_id unigram_vocab_size layer_multipliers ngram_heads_vocab_sizes ngram_heads_offsets".split()
EXACT = 1 << 24
"""Whole numbers up to this are exact in float32, in which ids are shifted."""


class NGramEmbeddingSeam(ForwardSeam):
    """Qwen4's n-gram embedding. Before the first token, and before an end of text, there are ends of text."""

    name = "rnn.ngram_embedding"
    produces = OP

    def reaches(self, part: nn.Module) -> bool:
        known = type(part).__name__ == "Qwen4ExpTextNGramEmbedding" and all(hasattr(part, name) for name in PARTS)
        return known and hasattr(part, "ngram_embedding")

    def forward(self, part: Any, entered: Entered) -> Callable[..., torch.Tensor]:
        shift, end = find_op(OP), part.eos_token_id

        def before(ids: torch.Tensor) -> torch.Tensor:
            """[B, S]: the id before each; before the first one there is `end`."""
            entered(OP)
            moved: torch.Tensor = shift((ids - end).float().unsqueeze(2)).squeeze(2).to(ids.dtype) + end
            return moved

        def forward(input_ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
            import torch

            if part.unigram_vocab_size > EXACT:
                raise CaptureError(
                    "ids of this vocabulary are too large to be shifted", why=f"{part.unigram_vocab_size} is more than {EXACT}"
                )
            ids = input_ids.long()
            mixed, earlier, seen = ids * part.layer_multipliers[0], ids, None
            numbers = []
            for back in range(1, part.ngram_size):
                earlier = before(earlier)
                seen = earlier if seen is None else torch.where(seen == end, end, earlier)
                mixed = torch.bitwise_xor(mixed, seen * part.layer_multipliers[back])
                heads = slice((back - 1) * part.heads_per_ngram, back * part.heads_per_ngram)
                numbers.append(mixed.unsqueeze(2) % part.ngram_heads_vocab_sizes[heads] + part.ngram_heads_offsets[heads])
            embedded: torch.Tensor = part.ngram_embedding(torch.cat(numbers, 2)).flatten(2)
            return embedded

        return forward
