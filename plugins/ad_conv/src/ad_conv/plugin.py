"""What the core asks first. Imports no torch: the hooks do, when they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ad_core.api import PluginInfo, hookimpl

if TYPE_CHECKING:
    from ad_core.api import Mixer

INFO = PluginInfo(name="conv", api=(1, 0), op_namespaces=("ad_conv",), summary="causal convolutions over the sequence")


@hookimpl
def ad_mixers() -> Sequence[Mixer]:
    from ad_conv.mixer import CausalConv1d

    return [CausalConv1d()]
