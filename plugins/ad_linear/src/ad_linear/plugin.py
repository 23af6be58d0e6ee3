"""What the core asks first. Imports no torch: the hooks do, when they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ad_core.api import PluginInfo, hookimpl

if TYPE_CHECKING:
    from ad_core.api import Mixer

INFO = PluginInfo(
    name="linear", api=(1, 0), op_namespaces=("ad_linear",), summary="linear attention with decay: lightning and its kin, mLSTM"
)


@hookimpl
def ad_mixers() -> Sequence[Mixer]:
    from ad_linear.mixer import Lightning, MLstm

    return [Lightning(), MLstm()]
