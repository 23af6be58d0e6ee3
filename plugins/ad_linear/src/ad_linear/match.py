"""Seams: two modules of transformers that write their recurrence out, in loops over chunks that cannot be exported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from ad_core.api.errors import CaptureError
from ad_core.graph.seams import Entered, ForwardSeam

if TYPE_CHECKING:
    import torch
    from torch import nn


_PIECES = "max_inference_chunksize"


class LightningAttention(ForwardSeam):
    """A layer whose loop stands between its projections, so that all of its forward is written here once more."""

    name = "linear.lightning_attention"
    produces = "ad_linear::lightning"
    _parts = ("qkv_proj", "out_proj", "output_gate", "norm", "act_fn", "slope_rate")

    def reaches(self, part: nn.Module) -> bool:
        return type(part).__name__.endswith("LightningAttention") and all(hasattr(part, name) for name in self._parts)

    def forward(self, part: nn.Module, entered: Entered) -> Callable[..., Any]:
        import torch

        from ad_core.graph.ops import find_op

        op, layer = find_op(self.produces), cast("Any", part)

        def forward(
            hidden_states: torch.Tensor,
            position_embeddings: Any = None,
            attention_mask: torch.Tensor | None = None,
            past_key_values: Any = None,
            **ignored: Any,
        ) -> tuple[torch.Tensor, None]:
            if past_key_values is not None:
                raise _with_a_state(part)
            if isinstance(attention_mask, torch.Tensor):
                raise CaptureError(f"{type(part).__name__} is given a padding mask", hint="captured sequences are not padded")
            batch, length, _ = hidden_states.shape
            heads = layer.num_attention_heads
            states = layer.act_fn(layer.qkv_proj(hidden_states)).reshape(batch, length, heads, -1)
            query, key, value = states.split(layer.head_dim, dim=3)
            entered(self.produces)
            output = op(query, key, value, -layer.slope_rate.flatten())
            output = layer.norm(output.reshape(batch, length, heads * layer.head_dim))
            return layer.out_proj(torch.sigmoid(layer.output_gate(hidden_states)) * output), None

        return forward


class MLstmBackend(ForwardSeam):
    """The part of an xLSTM layer that holds its recurrence and nothing else."""

    name = "linear.mlstm_backend"
    produces = "ad_linear::mlstm"

    @contextmanager
    def open(self, module: nn.Module, entered: Entered) -> Iterator[None]:
        # A model that is given more tokens than this goes through them in pieces, with states of its own from one to the next.
        configs = {id(config): config for config in (cast("Any", part).config for part in module.modules() if self.reaches(part))}
        before = {key: getattr(config, _PIECES) for key, config in configs.items() if hasattr(config, _PIECES)}
        try:
            for key in before:
                setattr(configs[key], _PIECES, sys.maxsize)
            with super().open(module, entered):
                yield
        finally:
            for key, pieces in before.items():
                setattr(configs[key], _PIECES, pieces)

    def reaches(self, part: nn.Module) -> bool:
        return type(part).__name__ in ("xLSTMBackend", "mLSTMBackend") and hasattr(getattr(part, "config", None), "eps")

    def forward(self, part: nn.Module, entered: Entered) -> Callable[..., Any]:
        from ad_core.graph.ops import find_op

        op, eps = find_op(self.produces), float(cast("Any", part).config.eps)

        def forward(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            igate: torch.Tensor,
            fgate: torch.Tensor,
            c_initial: torch.Tensor | None = None,
            n_initial: torch.Tensor | None = None,
            m_initial: torch.Tensor | None = None,
            **ignored: Any,
        ) -> tuple[torch.Tensor, None]:
            if c_initial is not None or n_initial is not None or m_initial is not None:
                raise _with_a_state(part)
            entered(self.produces)
            tokens_first = (x.transpose(1, 2) for x in (query, key, value, igate, fgate))
            return op(*tokens_first, scale=query.shape[-1] ** -0.5, eps=eps).transpose(1, 2), None

        return forward


def _with_a_state(part: nn.Module) -> CaptureError:
    return CaptureError(
        f"{type(part).__name__} is called with a state of its own",
        why="a captured sequence starts from zero, and the engine keeps what it leaves",
        hint="call the model with use_cache=False",
    )
