"""Seams: the library's chunked kernels, which its models call through module-level functions that are marked for replacement."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ad_core.api.errors import CaptureError
from ad_core.graph.seams import Entered, MarkedFunctionSeam

if TYPE_CHECKING:
    import torch


class _ChunkKernel(MarkedFunctionSeam):
    """What the original takes beyond these arguments it ignores, and so does the replacement."""

    def replacement(self, original: Callable[..., Any], entered: Entered) -> Callable[..., Any]:
        import torch

        from ad_core.graph.ops import find_op

        op = find_op(self.produces)

        def chunk_kernel(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            g: torch.Tensor | None = None,
            beta: torch.Tensor | None = None,
            chunk_size: int = 64,
            initial_state: torch.Tensor | None = None,
            output_final_state: bool = False,
            use_qk_l2norm_in_kernel: bool = False,
            **ignored: Any,
        ) -> tuple[torch.Tensor, None]:
            if initial_state is not None or output_final_state:
                raise CaptureError(
                    f"{self.mark} is called with a state of its own",
                    why="a captured sequence starts from zero, and the engine keeps what it leaves",
                    hint="call the model with use_cache=False",
                )
            if beta is None:
                beta = torch.ones_like(value[..., 0])
            entered(self.produces)
            # The original returns the dtype of the query, the op that of the value. They differ in no model that is known.
            output = op(query, key, value, g, beta, scale=query.shape[-1] ** -0.5, l2norm=use_qk_l2norm_in_kernel)
            return output.to(query.dtype), None

        return chunk_kernel


class ChunkGatedDelta(_ChunkKernel):
    name = "deltanet.chunk_gated_delta_rule"
    produces = "ad_deltanet::gated_delta"
    mark = "chunk_gated_delta_rule"


class ChunkKda(_ChunkKernel):
    name = "deltanet.chunk_kda"
    produces = "ad_deltanet::kda"
    mark = "chunk_kda"
