"""One step's packed batch: from rows on the host to the contract's batch fields at fixed addresses on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ad_core.api.batch import GROUPED_FIELDS
from ad_core.api.types import Limits

SAMPLED = -1
"""In `Row.token_ids`: the id that was sampled last for the row's lane. It is on the device; the host need not know it."""


@dataclass(frozen=True)
class Row:
    """One sequence's part of a step: `token_ids` continue the `context_len` tokens that are cached.

    `lane` is the sequence's place among the running ones, 1 to max_sequences; it indexes the ids sampled last. `pages` holds
    for every page group the page of each block of the sequence, 0 where freed. `num_outputs` counts the last tokens
    of the row whose logits are wanted: 0 for a chunk in mid-prompt, 1 for a decode.
    """

    token_ids: Sequence[int]
    context_len: int
    lane: int
    pages: tuple[Sequence[int], ...] = ()
    slot: int = 0
    num_outputs: int = 1


class Batch:
    """The fields of one step on both sides. Device tensors are views of the builder's: valid until the next `build`."""

    def __init__(self, host: dict[tuple[str, int], torch.Tensor], device: dict[tuple[str, int], torch.Tensor], counts: dict[str, int]):
        self._host, self._device = host, device
        self.num_tokens = counts["num_tokens"]
        self.num_sequences = counts["num_sequences"]
        self.num_decodes = counts["num_decodes"]
        self.max_query_len = counts["max_query_len"]
        self.max_seq_len = counts["max_seq_len"]
        self.num_outputs = counts["num_outputs"]
        self.page_size = counts["page_size"]

    def device_field(self, name: str, group: int = 0) -> torch.Tensor:
        """The field on the model's device; `group` matters for the fields of a page group."""
        return self._device[name, group if name in GROUPED_FIELDS else 0]

    def host_field(self, name: str, group: int = 0) -> torch.Tensor:
        """The field as a CPU tensor."""
        return self._host[name, group if name in GROUPED_FIELDS else 0]


@dataclass(frozen=True)
class GroupView:
    """A batch as the kernels of one page group see it: `ad_core.api.BatchView`."""

    batch: Batch
    group: int

    @property
    def num_tokens(self) -> int:
        return self.batch.num_tokens

    @property
    def num_sequences(self) -> int:
        return self.batch.num_sequences

    @property
    def num_decodes(self) -> int:
        return self.batch.num_decodes

    @property
    def max_query_len(self) -> int:
        return self.batch.max_query_len

    @property
    def max_seq_len(self) -> int:
        return self.batch.max_seq_len

    @property
    def page_size(self) -> int:
        return self.batch.page_size

    def host(self, name: str) -> torch.Tensor:
        return self.batch.host_field(name, self.group)


class BatchBuilder:
    """Packs rows into tensors that are allocated once, so that their addresses never change."""

    def __init__(self, limits: Limits, num_groups: int, device: torch.device):
        self.limits, self.num_groups, self.device = limits, num_groups, device
        tokens, sequences = limits.max_tokens, limits.max_sequences
        shapes: dict[tuple[str, int], tuple[tuple[int, ...], torch.dtype]] = {
            ("input_ids", 0): ((tokens,), torch.int64),
            ("positions", 0): ((tokens,), torch.int64),
            ("lanes", 0): ((tokens,), torch.int64),
            ("cu_seqlens", 0): ((sequences + 1,), torch.int32),
            ("query_lens", 0): ((sequences,), torch.int32),
            ("context_lens", 0): ((sequences,), torch.int32),
            ("seq_lens", 0): ((sequences,), torch.int32),
            ("state_slots", 0): ((sequences,), torch.int32),
            ("fresh", 0): ((sequences,), torch.bool),
            ("output_rows", 0): ((tokens,), torch.int64),
        }
        for group in range(num_groups):
            shapes["page_table", group] = ((sequences, limits.max_pages), torch.int32)
            shapes["token_slots", group] = ((tokens,), torch.int32)
        pinned = device.type == "cuda"
        self._host = {key: torch.zeros(shape, dtype=dtype, pin_memory=pinned) for key, (shape, dtype) in shapes.items()}
        self._numpy = {key: tensor.numpy() for key, tensor in self._host.items()}
        on_host = device.type == "cpu"
        self._device = self._host if on_host else {key: torch.zeros_like(value, device=device) for key, value in self._host.items()}
        self.last_ids = torch.zeros(sequences + 1, dtype=torch.int64, device=device)
        """The id sampled last for every lane; the sampler writes it."""

    def build(self, rows: Sequence[Row]) -> Batch:
        """Fills the fields from `rows`, decodes first. Overwrites what the last `build` gave."""
        field, page_size = self._numpy, self.limits.page_size
        lengths = np.fromiter((len(row.token_ids) for row in rows), np.int32, len(rows))
        contexts = np.fromiter((row.context_len for row in rows), np.int32, len(rows))
        tokens, sequences = int(lengths.sum()), len(rows)
        field["cu_seqlens", 0][1 : sequences + 1] = lengths.cumsum()
        field["query_lens", 0][:sequences] = lengths
        field["context_lens", 0][:sequences] = contexts
        field["seq_lens", 0][:sequences] = contexts + lengths
        field["state_slots", 0][:sequences] = [row.slot for row in rows]
        field["fresh", 0][:sequences] = contexts == 0
        starts = np.repeat(field["cu_seqlens", 0][:sequences], lengths)
        positions = np.arange(tokens) - starts + np.repeat(contexts, lengths)
        owners = np.repeat(np.arange(sequences), lengths)
        field["positions", 0][:tokens] = positions
        field["lanes", 0][:tokens] = np.repeat([row.lane for row in rows], lengths)
        field["input_ids", 0][:tokens] = np.concatenate([np.asarray(row.token_ids, np.int64) for row in rows])
        for group in range(self.num_groups):
            table = field["page_table", group]
            width = max(len(row.pages[group]) for row in rows)
            table[:sequences, :width] = 0
            for index, row in enumerate(rows):
                table[index, : len(row.pages[group])] = row.pages[group]
            field["token_slots", group][:tokens] = table[owners, positions // page_size] * page_size + positions % page_size
        outputs = np.fromiter((row.num_outputs for row in rows), np.int64, sequences)
        wanted = int(outputs.sum())
        ends = np.repeat(field["cu_seqlens", 0][1 : sequences + 1] - outputs, outputs)
        field["output_rows", 0][:wanted] = ends + np.arange(wanted) - np.repeat(outputs.cumsum() - outputs, outputs)
        counts = {
            "num_tokens": tokens,
            "num_sequences": sequences,
            "num_decodes": int(np.argmax(lengths > 1)) if (lengths > 1).any() else sequences,
            "max_query_len": int(lengths.max()),
            "max_seq_len": int((contexts + lengths).max()),
            "num_outputs": wanted,
            "page_size": page_size,
        }
        return self._views(counts)

    def input_ids(self, batch: Batch) -> torch.Tensor:
        """The ids of the step, [1, T], with ids that were sampled last filled in on the device."""
        ids = batch.device_field("input_ids")
        return torch.where(ids == SAMPLED, self.last_ids[batch.device_field("lanes")], ids)[None]

    def _views(self, counts: dict[str, int]) -> Batch:
        tokens, sequences = counts["num_tokens"], counts["num_sequences"]
        extents = {"cu_seqlens": sequences + 1, "output_rows": counts["num_outputs"]}
        by_token = {"input_ids", "positions", "lanes", "token_slots"}
        host = {}
        for key, tensor in self._host.items():
            name = key[0]
            host[key] = tensor[: extents.get(name, tokens if name in by_token else sequences)]
        if self._device is self._host:
            return Batch(host, host, counts)
        device = {}
        for key, view in host.items():
            device[key] = self._device[key][: len(view)]
            device[key].copy_(view, non_blocking=True)
        return Batch(host, device, counts)
