"""What the core asks first. Imports no torch: the hooks do, when they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ad_core.api import PluginInfo, hookimpl

if TYPE_CHECKING:
    from ad_core.api import Pass

INFO = PluginInfo(name="fusion", api=(1, 0), op_namespaces=("ad_fusion",), summary="operations that belong together, computed as one")


@hookimpl
def ad_passes() -> Sequence[Pass]:
    from ad_fusion.norm_pass import FuseNorms
    from ad_fusion.rotary_pass import FuseRotary

    return [FuseNorms(), FuseRotary()]
