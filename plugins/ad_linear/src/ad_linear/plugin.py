"""What the core asks first. Imports no torch: the hooks do, when they are called."""

from __future__ import annotations

from ad_core.api import PluginInfo

INFO = PluginInfo(name="linear", api=(1, 0), op_namespaces=("ad_linear",), summary="linear attention with decay: lightning and its kin, mLSTM")
