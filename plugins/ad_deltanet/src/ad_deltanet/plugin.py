"""What the core asks first. Imports no torch: the hooks do, when they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ad_core.api import PluginInfo, hookimpl

if TYPE_CHECKING:
    from ad_core.api import Mixer

INFO = PluginInfo(
    name="deltanet", api=(1, 0), op_namespaces=("ad_deltanet",), summary="delta rules: plain, gated by head and gated by channel"
)


@hookimpl
def ad_mixers() -> Sequence[Mixer]:
    from ad_deltanet.mixer import GatedDelta, KimiDelta

    return [GatedDelta(), KimiDelta()]
