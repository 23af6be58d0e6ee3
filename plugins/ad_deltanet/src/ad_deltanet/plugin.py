"""What the core asks first. Imports no torch: the hooks do, when they are called."""

from __future__ import annotations

from ad_core.api import PluginInfo

INFO = PluginInfo(name="deltanet", api=(1, 0), op_namespaces=("ad_deltanet",), summary="delta rules: plain, gated by head and gated by channel")
