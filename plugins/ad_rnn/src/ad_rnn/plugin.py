"""What the core asks first. Imports no torch: the hooks do, when they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ad_core.api import PluginInfo, hookimpl

if TYPE_CHECKING:
    from ad_core.api import Mixer

INFO = PluginInfo(name="rnn", api=(1, 0), op_namespaces=("ad_rnn",), summary="recurrences by channel: RG-LRU, RWKV's WKV and token shift")


@hookimpl
def ad_mixers() -> Sequence[Mixer]:
    from ad_rnn.mixer import RgLru, TokenShift, Wkv4

    return [RgLru(), TokenShift(), Wkv4()]
