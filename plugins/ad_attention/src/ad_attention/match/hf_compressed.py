"""Attention over recent tokens and over entries of compressed blocks, with an indexer among the entries or without."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ad_attention.match.hf_masks import plain_mask
from ad_core.api.errors import CaptureError
from ad_core.graph.ops import find_op
from ad_core.graph.seams import Entered, ForwardSeam

if TYPE_CHECKING:
    import torch
    from torch import nn

COMPRESS, SELECT, OP = "ad_attention::compress", "ad_attention::select", "ad_attention::compressed"
PARTS = "q_a_proj q_a_norm q_b_proj q_b_norm kv_proj kv_norm o_a_proj o_b_proj sinks head_dim sliding_window rope_layer_type".split()
COMPRESSOR_PARTS = "kv_proj gate_proj position_bias kv_norm rotary_emb compress_rate head_dim rope_layer_type".split()
INDEXER_PARTS = [*COMPRESSOR_PARTS, *"q_b_proj scorer num_heads index_topk".split()]
SCORER_PARTS = "weights_proj softmax_scale weights_scaling".split()


class CompressedAttentionSeam(ForwardSeam):
    """DeepSeek-V4's attention where it has a compressor. Without one it goes through the attention interface like others."""

    name = "hf.compressed_attention"
    produces = OP

    def reaches(self, part: nn.Module) -> bool:
        if type(part).__name__ != "DeepseekV4Attention" or not _has(part, PARTS):
            return False
        compressor: Any = part.compressor
        if not _has(compressor, COMPRESSOR_PARTS):
            return False
        indexer: Any = getattr(compressor, "indexer", None)
        return indexer is None or (_has(indexer, INDEXER_PARTS) and _has(indexer.scorer, SCORER_PARTS))

    def forward(self, part: Any, entered: Entered) -> Callable[..., Any]:
        rotate = sys.modules[type(part).__module__].apply_rotary_pos_emb
        compressor = part.compressor
        indexer: Any = getattr(compressor, "indexer", None)
        compress, select, op = find_op(COMPRESS), find_op(SELECT), find_op(OP)

        def entries(of: Any, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            """What stands for each block, at its last token: [B, S, D]. Its rotary position is that of the block's first token."""
            x, gate, every = of.kv_proj(hidden), of.gate_proj(hidden), of.compress_rate
            entered(COMPRESS)
            made = of.kv_norm(compress(x, gate, of.position_bias, every=every, overlap=x.shape[2] == 2 * of.head_dim))
            cos, sin = of.rotary_emb(made, position_ids=positions // every * every, layer_type=of.rope_layer_type)
            rotated: torch.Tensor = rotate(made.unsqueeze(2), cos, sin, unsqueeze_dim=2).squeeze(2)
            return rotated

        def chosen(hidden: torch.Tensor, latent: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            """The blocks that each token attends to: [B, S, K]."""
            cos, sin = indexer.rotary_emb(hidden, position_ids=positions, layer_type=indexer.rope_layer_type)
            query = indexer.q_b_proj(latent).unflatten(2, (-1, indexer.head_dim))
            query = rotate(query, cos, sin, unsqueeze_dim=2)
            weight = indexer.scorer.weights_proj(hidden).float() * indexer.scorer.weights_scaling
            key = entries(indexer, hidden, positions)
            entered(SELECT)
            found: torch.Tensor = select(
                query,
                key,
                weight,
                count=indexer.index_topk,
                scale=indexer.scorer.softmax_scale,
                every=indexer.compress_rate,
            )
            return found

        def forward(
            hidden_states: torch.Tensor,
            position_embeddings: Any,
            position_ids: torch.Tensor,
            attention_mask: Any,
            cache: Any = None,
            **_: Any,
        ) -> tuple[torch.Tensor, None]:
            mask = plain_mask(attention_mask, type(part).__name__)
            if mask.window != part.sliding_window:
                raise CaptureError(
                    "an attention layer over recent tokens and compressed blocks has another mask than its window",
                    where=type(part).__name__,
                    why=f"its window is {part.sliding_window} and its mask's {mask.window}",
                )
            cos, sin = position_embeddings[part.rope_layer_type]
            by_head = (*hidden_states.shape[:-1], -1, part.head_dim)
            latent = part.q_a_norm(part.q_a_proj(hidden_states))
            query = rotate(part.q_b_norm(part.q_b_proj(latent).view(by_head)), cos, sin, unsqueeze_dim=2)
            key = rotate(part.kv_norm(part.kv_proj(hidden_states)).view(by_head), cos, sin, unsqueeze_dim=2).squeeze(2)
            entry = entries(compressor, hidden_states, position_ids)
            selected = None if indexer is None else chosen(hidden_states, latent, position_ids)
            entered(OP)
            mixed = op(
                query,
                key,
                entry,
                selected,
                part.sinks,
                scale=float(part.scaling),
                window=part.sliding_window,
                every=compressor.compress_rate,
            )
            # a key is a value too, so what comes out is turned by the keys' positions: turned back by the query's, distances are left
            mixed = rotate(mixed, cos, -sin, unsqueeze_dim=2)
            grouped = mixed.flatten(2).unflatten(2, (part.config.o_groups, -1))
            return part.o_b_proj(part.o_a_proj(grouped).flatten(2)), None

        return forward


def _has(part: Any, names: list[str]) -> bool:
    return part is not None and all(hasattr(part, name) for name in names)
