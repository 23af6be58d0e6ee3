"""What the core asks first. Imports no torch: the hooks do, when they are called."""

from __future__ import annotations

from ad_core.api import PluginInfo

INFO = PluginInfo(name="conv", api=(1, 0), op_namespaces=("ad_conv",), summary="causal convolutions over the sequence")
