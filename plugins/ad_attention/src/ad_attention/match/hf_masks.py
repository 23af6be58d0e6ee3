"""What transformers' mask interface returns while the seam is open: what a mask means, and no tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from ad_core.api.errors import CaptureError

if TYPE_CHECKING:
    import torch

_WHY = "which is only a description while attention is captured through the seam"


class MaskDescription:
    """A causal mask, with its window (`j > i - window`) or chunk (`j // chunk == i // chunk`); or the `problem` why it is no such mask.
    `at` is the length and the device of the tensor that it stands for.

    Models only hand it on to their attention. One that computes on it gets a TypeError or an AttributeError that says so: it would
    otherwise be captured without what it does to its mask. One that takes a part of it gets the real thing, for something else than
    its attention: an indexer that chooses among the keys. If that is no mixer that we know, its tokens still mix in the graph.
    """

    def __init__(self, window: int | None = None, chunk: int | None = None, problem: str | None = None, at: tuple[Any, Any] | None = None):
        self.window, self.chunk, self.problem, self._at = window, chunk, problem, at

    def __getitem__(self, index: Any) -> torch.Tensor:
        """A part of the mask as a tensor [1, 1, S, S] bool, true where a key is seen."""
        if self.problem is not None or self._at is None:
            raise TypeError(f"the model takes a part of its attention mask, {_WHY} ({self.problem})")
        return self.seen(*self._at)[None, None][index]

    def seen(self, length: Any, device: Any) -> torch.Tensor:
        """The mask as a tensor [S, S] bool."""
        import torch

        keys = torch.arange(length, device=device)
        queries = keys[:, None]
        seen = keys <= queries
        if self.window is not None:
            seen = seen & (keys > queries - self.window)
        if self.chunk is not None:
            seen = seen & (keys // self.chunk == queries // self.chunk)
        return seen

    def to(self, *args: Any, **kwargs: Any) -> MaskDescription:
        """Itself: a description has no device and no dtype."""
        return self

    def __repr__(self) -> str:
        return f"MaskDescription(window={self.window}, chunk={self.chunk}, problem={self.problem!r})"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"the model reads {name!r} of its attention mask, {_WHY}")


def _refuse(name: str) -> Callable[..., NoReturn]:
    def method(self: MaskDescription, *args: Any) -> NoReturn:
        raise TypeError(f"the model computes on its attention mask ({name}), {_WHY}")

    method.__name__ = name
    return method


_BINARY = "add sub mul truediv floordiv mod pow matmul and or xor".split()
_OTHERS = "neg pos abs invert bool len iter setitem eq ne lt le gt ge".split()
for _name in [side + name for name in _BINARY for side in ("", "r", "i")] + _OTHERS:
    setattr(MaskDescription, f"__{_name}__", _refuse(f"__{_name}__"))


def plain_mask(mask: Any, where: str) -> MaskDescription:
    """The description of a causal mask, perhaps with a window, that a layer was called with. Raises `CaptureError` for any other."""
    if not isinstance(mask, MaskDescription):
        raise CaptureError("an attention layer is not called with a mask of transformers' mask interface", where=where)
    if mask.problem or mask.chunk:
        raise CaptureError(
            "an attention layer needs a plain causal mask", where=where, why=mask.problem or f"its mask has chunks of {mask.chunk}"
        )
    return mask


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    **options: Any,
) -> MaskDescription:
    """The mask interface: called as `transformers.masking_utils.sdpa_mask` is, where no function means causal.

    Never raises: a mask that nobody uses may be anything.
    """
    from transformers.masking_utils import causal_mask_function

    try:
        parts = _primitives(mask_function or causal_mask_function)
    except _UnknownMask as unknown:
        return MaskDescription(problem=str(unknown))
    if not (isinstance(q_offset, int) and q_offset == 0 and isinstance(kv_offset, int) and kv_offset == 0):
        return MaskDescription(problem="the mask is shifted by a cache; capture runs without one")
    if attention_mask is not None and not _all_ones(attention_mask):
        return MaskDescription(problem="the model masks tokens by a padding mask of its own")
    if "causal" not in parts:
        return MaskDescription(problem="it is not causal")
    return MaskDescription(parts.get("window"), parts.get("chunk"), at=(q_length, options.get("device")))


class _UnknownMask(Exception):
    pass


def _primitives(function: Any) -> dict[str, int | None]:
    """Names, with their sizes, of the primitives that `function` combines by "and": closures of transformers.masking_utils hold them."""
    maker = getattr(function, "__qualname__", repr(function)).split(".")[0]
    if getattr(function, "__module__", None) != "transformers.masking_utils":
        raise _UnknownMask(f"its mask function {maker} is the model's own")
    held = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
    match maker:
        case "causal_mask_function":
            return {"causal": None}
        case "and_masks":
            parts: dict[str, int | None] = {}
            for part in held["mask_functions"]:
                for name, size in _primitives(part).items():
                    # two windows at once are the smaller; two chunk sizes are no mask that we know
                    if name == "chunk" and parts.get(name, size) != size:
                        raise _UnknownMask(f"it combines chunks of {parts[name]} and {size}")
                    parts[name] = min(size, parts[name]) if name == "window" and parts.get(name) and size else size  # type: ignore[type-var]
            return parts
        case "sliding_window_overlay":
            return {"window": held["sliding_window"]}
        case "chunked_overlay":
            return {"chunk": held["chunk_size"]}
        case "packed_sequence_mask_function":
            # tells sequences apart by jumps in position_ids; here a sequence is what the batch says it is
            return {}
        case "remap_positions_for_packed_sequence":
            return _primitives(held["mask_function"])
        case "bidirectional_mask_function":
            return {}
        case _:
            raise _UnknownMask(f"{maker} is not causal, a window or a chunk")


def _all_ones(mask: Any) -> bool:
    """Whether a padding mask that the model made for itself masks nothing. Of a traced one nobody can say."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(mask, torch.Tensor) or torch.compiler.is_compiling():
        return False
    # where there are no values the module is only walked through, and no graph comes of it
    return mask.is_meta or isinstance(mask, FakeTensor) or bool(mask.all())
