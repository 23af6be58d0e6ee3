"""What the core asks first. Imports no torch: the hooks do, when they are called."""

from __future__ import annotations

from ad_core.api import PluginInfo

INFO = PluginInfo(name="mamba", api=(1, 0), op_namespaces=("ad_mamba",), summary="selective state spaces: selective scan (Mamba-1) and SSD (Mamba-2)")
