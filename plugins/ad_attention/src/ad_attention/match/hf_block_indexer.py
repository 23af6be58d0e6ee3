"""Attention to the tokens of chosen blocks: an indexer scores the mean keys of blocks; the tokens of an incomplete one are always seen."""

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

COMPRESS, SELECT, OP = "ad_attention::compress", "ad_attention::select", "ad_attention::selected"
PARTS = "q_proj k_proj v_proj o_proj q_norm k_norm head_dim scaling indexer".split()
INDEXER_PARTS = "index_qk_proj q_layernorm k_layernorm index_n_heads index_head_dim block_topk compress_ratio".split()


class BlockIndexerSeam(ForwardSeam):
    """Qwen4's attention with its token indexer."""

    name = "hf.block_indexer"
    produces = OP

    def reaches(self, part: nn.Module) -> bool:
        known = type(part).__name__ == "Qwen4ExpTextAttention" and all(hasattr(part, name) for name in PARTS)
        return known and all(hasattr(part.indexer, name) for name in INDEXER_PARTS)

    def forward(self, part: Any, entered: Entered) -> Callable[..., Any]:
        rotate = sys.modules[type(part).__module__].apply_rotary_pos_emb
        indexer, every = part.indexer, part.indexer.compress_ratio
        compress, select, op = find_op(COMPRESS), find_op(SELECT), find_op(OP)

        def at_first_token(x: torch.Tensor) -> torch.Tensor:
            """At the last token of each block what `x` [B, S, C] is at the first one."""
            import torch

            first = torch.arange(every, device=x.device)[:, None] == 0
            bias = torch.where(first, 0.0, -torch.inf).expand(-1, x.shape[2])
            entered(COMPRESS)
            found: torch.Tensor = compress(x, None, bias, every=every)
            return found

        def chosen(hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            """The positions that each token attends to: [B, S, K]."""
            import torch

            rows = indexer.index_qk_proj(hidden).unflatten(2, (-1, indexer.index_head_dim))
            query, key = rows[:, :, : indexer.index_n_heads], rows[:, :, indexer.index_n_heads :].squeeze(2)
            query = rotate(indexer.q_layernorm(query), cos=cos, sin=sin, unsqueeze_dim=2)
            entered(COMPRESS)
            key = indexer.k_layernorm(compress(key, every=every))
            cos, sin = at_first_token(torch.cat([cos, sin], -1)).chunk(2, -1)
            key = rotate(key.unsqueeze(2), cos=cos, sin=sin, unsqueeze_dim=2).squeeze(2)
            entered(SELECT)
            scale = indexer.index_head_dim**-0.5
            blocks = select(query, key, query.new_ones(query.shape[:3]), count=indexer.block_topk, scale=scale, every=every)
            tokens = blocks.unsqueeze(3) * every + torch.arange(every, device=hidden.device)
            tokens = torch.where(blocks.unsqueeze(3) < 0, -1, tokens).flatten(2)
            positions = torch.arange(hidden.shape[1], device=hidden.device)[:, None]
            rest = (positions + 1) // every * every + torch.arange(every - 1, device=hidden.device)
            rest = torch.where(rest <= positions, rest, -1)
            return torch.cat([tokens, rest.expand(hidden.shape[0], -1, -1)], 2)

        def forward(
            hidden_states: torch.Tensor, position_embeddings: Any, attention_mask: Any = None, cache: Any = None, **_: Any
        ) -> tuple[torch.Tensor, None]:
            mask = plain_mask(attention_mask, type(part).__name__)
            if mask.window:
                raise CaptureError("an attention layer chooses among its keys and has a window besides", where=type(part).__name__)
            cos, sin = position_embeddings
            by_head = (*hidden_states.shape[:-1], -1, part.head_dim)
            query, gate = part.q_proj(hidden_states).view(*by_head[:-1], 2 * part.head_dim).chunk(2, -1)
            query, key = part.q_norm(query), part.k_norm(part.k_proj(hidden_states).view(by_head))
            query, key = rotate(query, key, cos, sin, unsqueeze_dim=2)
            selected = chosen(hidden_states, cos, sin)
            entered(OP)
            mixed = op(query, key, part.v_proj(hidden_states).view(by_head), selected, scale=float(part.scaling)).flatten(2)
            return part.o_proj(mixed * gate.flatten(2).sigmoid()), None

        return forward
