"""What the core asks first. Imports no torch: the hooks do, when they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ad_core.api import PluginInfo, hookimpl

if TYPE_CHECKING:
    from ad_core.api import Mixer, Pass

INFO = PluginInfo(name="attention", api=(1, 0), op_namespaces=("ad_attention",), summary="softmax attention in all its forms")


@hookimpl
def ad_mixers() -> Sequence[Mixer]:
    from ad_attention.compressed.mixer import Compress, Compressed
    from ad_attention.latent.mixer import LatentAttention
    from ad_attention.mixer import Attention
    from ad_attention.sparse.mixer import Select, Selected

    return [Attention(), LatentAttention(), Select(), Selected(), Compress(), Compressed()]


@hookimpl
def ad_passes() -> Sequence[Pass]:
    from ad_attention.latent.rewrite import FindLatent

    return [FindLatent()]
