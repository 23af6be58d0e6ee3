"""What the core asks first. Imports no torch: the hooks do, when they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ad_core.api import PluginInfo, hookimpl

if TYPE_CHECKING:
    from ad_core.api import Mixer

INFO = PluginInfo(
    name="mamba", api=(1, 0), op_namespaces=("ad_mamba",), summary="selective state spaces: selective scan (Mamba-1) and SSD (Mamba-2)"
)


@hookimpl
def ad_mixers() -> Sequence[Mixer]:
    from ad_mamba.mixer import SSD, SelectiveScan

    return [SelectiveScan(), SSD()]
