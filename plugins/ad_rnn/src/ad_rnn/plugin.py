"""What the core asks first. Imports no torch: the hooks do, when they are called."""

from __future__ import annotations

from ad_core.api import PluginInfo

INFO = PluginInfo(name="rnn", api=(1, 0), op_namespaces=("ad_rnn",), summary="recurrences by channel: RG-LRU, RWKV-4")
