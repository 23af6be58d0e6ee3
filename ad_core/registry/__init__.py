"""Which plugins there are, which of them can be used, and who wins when several offer the same. Imports no torch.

`ad_core.registry.arbitrate` chooses kernels, `ad_core.registry.index` knows what to install.
"""

from ad_core.registry.records import Offer, PluginRecord, State
from ad_core.registry.registry import Registry, RegistrySpec, isolated

__all__ = ["Offer", "PluginRecord", "Registry", "RegistrySpec", "State", "isolated"]
