"""What the core asks first. Imports no torch: the hooks do, when they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ad_core.api import PluginInfo, hookimpl

if TYPE_CHECKING:
    from ad_core.api import Loader

INFO = PluginInfo(name="quant", api=(1, 0), op_namespaces=("ad_quant",), summary="checkpoint schemes: GGUF files")


@hookimpl
def ad_loaders() -> Sequence[Loader]:
    from ad_quant.gguf import GGUFLoader

    return [GGUFLoader()]
