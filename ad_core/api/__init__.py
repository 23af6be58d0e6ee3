"""The contract, version 1: everything a plugin may import. Importing it imports no torch."""

from ad_core.api.batch import FIELDS, GROUPED_FIELDS, BatchView
from ad_core.api.errors import AdError
from ad_core.api.hooks import hookimpl
from ad_core.api.loading import Checkpoint, CompileBackend, Loader
from ad_core.api.matching import Matcher, Proposal, Seam
from ad_core.api.mixer import CanonicalOp, Kernel, Mixer
from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.resources import BufferSpec, PagedTokens, Resource, SlotState
from ad_core.api.types import (
    API_VERSION,
    ENTRY_POINT_GROUP,
    Declined,
    Environment,
    Limits,
    OpCall,
    PluginInfo,
    Role,
    Safety,
    ShardRule,
    Stage,
)

__all__ = [
    "API_VERSION",
    "ENTRY_POINT_GROUP",
    "FIELDS",
    "GROUPED_FIELDS",
    "AdError",
    "BatchView",
    "BufferSpec",
    "CanonicalOp",
    "Checkpoint",
    "CompileBackend",
    "Declined",
    "Environment",
    "Kernel",
    "Limits",
    "Loader",
    "Matcher",
    "Mixer",
    "OpCall",
    "PagedTokens",
    "Pass",
    "PassContext",
    "PassReport",
    "PluginInfo",
    "Proposal",
    "Resource",
    "Role",
    "Safety",
    "Seam",
    "ShardRule",
    "SlotState",
    "Stage",
    "hookimpl",
]
