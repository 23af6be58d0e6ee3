"""The seam of transformers' models: their attention interface calls the canonical op, their mask interface only describes the mask."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import CodeType, FunctionType, NoneType
from typing import TYPE_CHECKING, Any

from ad_attention.match.hf_masks import MaskDescription, describe_mask
from ad_attention.match.written_out import written_out
from ad_core.api import Declined, Seam
from ad_core.api.errors import CaptureError

if TYPE_CHECKING:
    import torch
    from torch import nn

OP = "ad_attention::attention"
SELECTED = "ad_attention::selected"

HARMLESS = frozenset(
    {
        "dropout",  # capture runs in eval mode
        "training",
        "deterministic",
        "position_ids",  # attention kernels look for packed sequences in it; rope is applied before
        "cache_position",
        "layer_idx",
        "use_cache",
        "return_dict",
        "output_attentions",  # the interface may return None for them, as sdpa does
        "output_hidden_states",
        "output_router_logits",
        "logits_to_keep",
    }
)
"""Keyword arguments that models hand to their attention and that do not change its result."""


class HfAttentionSeam(Seam):
    """`attn_implementation="ad"`, for a model that is already built."""

    name = "hf.attention"
    produces = OP
    transformers = ">=5.17"

    def applies(self, module: nn.Module) -> Declined | None:
        """Declines what is no transformers model, and models none of whose classes consults the attention interface: these accept
        any name for it and compute something else."""
        from transformers import PreTrainedModel
        from transformers.modeling_utils import AttentionInterface

        if not any(isinstance(part, PreTrainedModel) for part in module.modules()):
            return Declined(f"{type(module).__name__} holds no transformers model")
        classes = {type(part): path for path, part in module.named_modules() if not type(part).__module__.startswith("torch.")}
        if any(_reaches(kind, AttentionInterface) for kind in classes):
            return None
        named = sorted(f"{kind.__name__} ({path})" for kind, path in classes.items() if re.search("Attention|Attn", kind.__name__))
        found = f"; it has {', '.join(named)}" if named else ""
        return Declined(f"no class of {type(module).__name__} goes through transformers' attention interface{found}")

    def open(self, module: nn.Module, entered: Callable[[str], None]) -> AbstractContextManager[None]:
        """Registers our functions under a name of their own and sets that name on every configuration that the module reads."""
        return _opened(module, entered)


@contextmanager
def _opened(module: nn.Module, entered: Callable[[str], None]) -> Iterator[None]:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    function = _attention_function(module, entered)
    # private names, but `register` has no inverse
    functions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    key = "ad"
    while functions.setdefault(key, function) is not function:  # another capture is under way in this process
        key += "'"
    masks[key] = describe_mask
    configs = _configurations(module)
    before = [vars(config).get(_ATTRIBUTE, _MISSING) for config in configs]
    try:
        for config in configs:
            vars(config)[_ATTRIBUTE] = key
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            if value is _MISSING:
                vars(config).pop(_ATTRIBUTE, None)
            else:
                vars(config)[_ATTRIBUTE] = value
        del functions[key], masks[key]


_ATTRIBUTE = "_attn_implementation_internal"
"""Where a configuration keeps the name. Its property's setter writes to sub-configurations too, so it could not be put back exactly."""
_MISSING = object()


def _configurations(module: nn.Module) -> list[Any]:
    """Every distinct configuration object that a part of the module holds, with their sub-configurations."""
    from transformers import PreTrainedConfig

    found: dict[int, Any] = {}

    def visit(config: Any) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for value in list(vars(config).values()):
                visit(value)

    for part in module.modules():
        for value in vars(part).values():
            visit(value)
    return list(found.values())


def _reaches(kind: type, interface: type) -> bool:
    """Whether a method of the class reads a global that is an attention interface."""

    def names(code: CodeType) -> set[str]:
        inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        return set(code.co_names).union(*map(names, inner))

    for member in vars(kind).values():
        function = getattr(member, "__func__", member)
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        if isinstance(function, FunctionType):
            read = (function.__globals__.get(name) for name in names(function.__code__))
            if any(isinstance(value, interface) for value in read):
                return True
    # PreTrainedModel itself reads the interface, to check names
    own = (base for base in kind.__bases__ if not base.__module__.startswith(("torch.", "builtins", "transformers.modeling_utils")))
    return any(_reaches(base, interface) for base in own)


def _attention_function(module: nn.Module, entered: Callable[[str], None]) -> Callable[..., Any]:
    """The attention interface for one capture of `module`."""
    from ad_core.graph.ops import find_op

    op = find_op(OP)
    paths = {id(part): path for path, part in module.named_modules()}

    def attention(
        part: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        scaling: Any = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        is_causal: bool | None = None,
        indices: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [B, H, S, D], key [B, G, S, D], value [B, G, S, Dv], after rope -> [B, S, H, Dv]."""
        where = f"{paths.get(id(part), '?')} ({type(part).__name__})"
        sinks = s_aux if s_aux is not None else sinks
        causal = getattr(part, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is None and not causal and not sliding_window:
            mask = None  # all keys: of one token, or its tokens mix in the graph
            _check_operands(where, query, key, value, scaling, sinks, others)
        else:
            mask = _checked(where, query, key, value, attention_mask, scaling, sliding_window, is_causal, sinks, others)
        scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
        own_sinks = sinks is not None and sinks.dim() > 1
        if indices is not None:
            if mask is None or mask.window or mask.chunk or softcap or own_sinks or position_bias is not None:
                raise _refusal(where, "it chooses its keys and has a window, chunks, a soft-cap or a bias besides")
            entered(SELECTED)
            return find_op(SELECTED)(*(x.transpose(1, 2) for x in (query, key, value)), indices, scale=scale, sinks=sinks), None
        if mask is None or own_sinks or position_bias is not None:  # no constants say what this is
            return written_out(query, key, value, mask, scale, softcap, position_bias, sinks), None
        entered(OP)
        result = op(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            scale=scale,
            window=mask.window,
            chunk=mask.chunk,
            softcap=float(softcap) if softcap else None,
            sinks=sinks,
        )
        return result, None

    return attention


def _refusal(where: str, why: str) -> CaptureError:
    return CaptureError(
        "an attention layer asks for more than causal softmax attention",
        where=where,
        why=why,
        hint="capture falls back to matching the exported graph; if that declines too, a plugin has to claim this layer",
    )


def _checked(
    where: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    scaling: Any,
    sliding_window: int | None,
    is_causal: bool | None,
    sinks: torch.Tensor | None,
    others: Mapping[str, Any],
) -> MaskDescription:
    """The description of the mask. Raises `CaptureError` for everything that the canonical op would not compute."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    refuse = partial(_refusal, where)

    if not isinstance(mask, MaskDescription):
        raise refuse("it is called without a mask" if mask is None else f"its mask is a {type(mask).__name__} that the model made itself")
    if mask.problem:
        raise refuse(f"mask: {mask.problem}")
    if is_causal is False:
        raise refuse("it is called with is_causal=False")
    if sliding_window and sliding_window != mask.window:
        raise refuse(f"its sliding_window is {sliding_window} and its mask's window is {mask.window}")
    if mask.window and mask.chunk:
        raise refuse(f"its mask has a window ({mask.window}) and chunks ({mask.chunk})")
    if not statically_known_true(query.shape[2] == key.shape[2]):
        raise refuse(f"queries and keys are of different length ({query.shape[2]}, {key.shape[2]}), as in cross-attention")
    _check_operands(where, query, key, value, scaling, sinks, others)
    return mask


def _check_operands(
    where: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: Any,
    sinks: torch.Tensor | None,
    others: Mapping[str, Any],
) -> None:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    refuse = partial(_refusal, where)

    if not isinstance(scaling, (int, float, NoneType)):
        raise refuse(f"its scaling is a {type(scaling).__name__} and not a number")
    if not statically_known_true(key.shape[2] == value.shape[2]):
        raise refuse(f"keys and values are of different length ({key.shape[2]}, {value.shape[2]})")
    if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
        raise refuse(f"{query.shape[1]} query heads over {key.shape[1]} key heads and {value.shape[1]} value heads")
    if sinks is not None and not _is_sinks(sinks, query):
        raise refuse(f"its sinks have the shape {tuple(sinks.shape)} and not one value a head, nor one a head and query")
    unknown = sorted(name for name, argument in others.items() if name not in HARMLESS and argument is not None and argument is not False)
    if unknown:
        raise refuse(f"it passes {', '.join(unknown)} to its attention, which may change the result")


def _is_sinks(sinks: torch.Tensor, query: torch.Tensor) -> bool:
    """Whether these are one value a head, [H], or one a head and query, [B, H, S, 1]."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if sinks.dim() == 1:
        return bool(sinks.shape[0] == query.shape[1])
    wanted = (*query.shape[:3], 1)
    return sinks.dim() == 4 and all(statically_known_true(size == other) for size, other in zip(sinks.shape, wanted, strict=True))
