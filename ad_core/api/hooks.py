"""The hooks of a plugin. All of them return objects; none registers anything. They are called one plugin at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer

    from ad_core.api.loading import CompileBackend, Loader
    from ad_core.api.matching import Matcher, Seam
    from ad_core.api.mixer import CanonicalOp, Kernel, Mixer
    from ad_core.api.passes import Pass

PROJECT = "ad"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def ad_mixers() -> Sequence[Mixer]:  # type: ignore[empty-body]
    """Token mixers: canonical op, how it is found, what it keeps, its kernels, how it shards."""


@hookspec
def ad_ops() -> Sequence[CanonicalOp]:  # type: ignore[empty-body]
    """Canonical ops without memory (MoE, norms) with their kernels."""


@hookspec
def ad_kernels() -> Sequence[Kernel]:  # type: ignore[empty-body]
    """Kernels for a canonical op that another plugin owns."""


@hookspec
def ad_matchers() -> Sequence[Matcher | Seam]:  # type: ignore[empty-body]
    """New spellings of an existing canonical op."""


@hookspec
def ad_passes() -> Sequence[Pass]:  # type: ignore[empty-body]
    """Fusion, quantisation, sharding, any rewrite."""


@hookspec
def ad_compilers() -> Sequence[CompileBackend]:  # type: ignore[empty-body]
    """Compile backends."""


@hookspec
def ad_loaders() -> Sequence[Loader]:  # type: ignore[empty-body]
    """Checkpoint formats."""


@hookspec
def ad_drafters() -> Sequence[object]:  # type: ignore[empty-body]
    """Speculative proposers. The core collects them; nothing runs them yet."""


@hookspec
def ad_commands() -> Sequence[typer.Typer]:  # type: ignore[empty-body]
    """Sub-commands of `ad`, each a named `typer.Typer`."""
