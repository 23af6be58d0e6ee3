"""AutoDeploy as plugins: an unmodified causal language model in, an inference engine out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ad_core.llm import LLM
    from ad_core.pipeline import CompiledGraph, compile
    from ad_core.runtime.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "CompiledGraph", "SamplingParams", "__version__", "compile"]

_HOMES = {
    "LLM": "ad_core.llm",
    "CompiledGraph": "ad_core.pipeline",
    "compile": "ad_core.pipeline",
    "SamplingParams": "ad_core.runtime.params",
}


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that `ad plugins` and plugin imports stay free of torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ad_core' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
