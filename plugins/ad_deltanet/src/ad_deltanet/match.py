"""Seams: the library's chunked kernels, which its models call through module-level functions that are marked for replacement."""

from __future__ import annotations

import inspect
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
        signature = inspect.signature(original)

        def chunk_kernel(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            given = _by_name(signature, args, kwargs)
            query, key, value, g, beta = (given.pop(name, None) for name in ("query", "key", "value", "g", "beta"))
            if given.pop("initial_state", None) is not None or given.pop("output_final_state", False):
                raise CaptureError(
                    f"{self.mark} is called with a state of its own",
                    why="a captured sequence starts from zero, and the engine keeps what it leaves",
                    hint="call the model with use_cache=False",
                )
            if given.get("cu_seqlens") is not None or given.get("head_first"):
                raise CaptureError(f"{self.mark} is called for packed sequences or with heads before tokens")
            l2norm, scale = bool(given.get("use_qk_l2norm_in_kernel", False)), given.get("scale")
            if beta is None:
                beta = torch.ones_like(value[..., 0])
            entered(self.produces)
            # The original returns the dtype of the query, the op that of the value. They differ in no model that is known.
            output = op(query, key, value, g, beta, scale=query.shape[-1] ** -0.5 if scale is None else float(scale), l2norm=l2norm)
            return output.to(query.dtype), None

        return chunk_kernel


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that transformers has for them, whatever the function that was called has."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    given: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        rest = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        given |= value if rest else {name: value}
    return {_NAMES.get(name, name): value for name, value in given.items()}


_NAMES = {"q": "query", "k": "key", "v": "value"}


class ChunkGatedDelta(_ChunkKernel):
    name = "deltanet.chunk_gated_delta_rule"
    produces = "ad_deltanet::gated_delta"
    mark = "chunk_gated_delta_rule"


class ChunkKda(_ChunkKernel):
    name = "deltanet.chunk_kda"
    produces = "ad_deltanet::kda"
    mark = "chunk_kda"
