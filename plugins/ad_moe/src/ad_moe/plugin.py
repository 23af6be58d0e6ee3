"""What the core asks first. Imports no torch: the hooks do, when they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ad_core.api import PluginInfo, hookimpl

if TYPE_CHECKING:
    from ad_core.api import CanonicalOp, Pass

INFO = PluginInfo(name="moe", api=(1, 0), op_namespaces=("ad_moe",), summary="routed experts")


@hookimpl
def ad_ops() -> Sequence[CanonicalOp]:
    from ad_moe.moe import Experts, RoutedLinear

    return [Experts(), RoutedLinear()]


@hookimpl
def ad_passes() -> Sequence[Pass]:
    from ad_moe.pack_pass import PackExperts
    from ad_moe.stack_pass import StackExperts

    return [StackExperts(), PackExperts()]
