"""Whether a plugin fits this core, asked before its import (of its metadata) and after (of its `INFO`).

Each gate answers with the reason of a refusal, or with the empty string.
"""

from __future__ import annotations

from typing import Any

import importlib_metadata
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ad_core.api.types import API_VERSION, ENTRY_POINT_GROUP, PluginInfo
from ad_core.registry.discovery import GROUP_PREFIX, Found

CORE_DISTRIBUTION = "ad-core"
RESERVED_NAMESPACES = frozenset({"aten", "prim", "prims", "c10d", "higher_order", "inductor", "quantized", "ad", "ad_core"})
"""Op namespaces that no plugin may claim."""


def core_version() -> str:
    """The running core's version."""
    import ad_core

    return ad_core.__version__


def distribution_gate(found: Found) -> str:
    """The contract that the plugin was written for, by its group; the core that it asks for, by its own requirements."""
    if found.group != ENTRY_POINT_GROUP:
        theirs, ours = found.group.removeprefix(GROUP_PREFIX), ENTRY_POINT_GROUP.removeprefix(GROUP_PREFIX)
        return f"it is written for version {theirs} of the contract, this core speaks version {ours}"
    for text in found.requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            return f"its requirement {text!r} cannot be read: {error}"
        if canonicalize_name(requirement.name) != CORE_DISTRIBUTION or not _applies(requirement):
            continue
        if not requirement.specifier.contains(core_version(), prereleases=True):
            return f"it needs ad-core{requirement.specifier}, found {core_version()}"
    return ""


def info_gate(info: PluginInfo) -> str:
    """The contract's version that the plugin asks for: our major, and at most our minor."""
    major, minor = info.api
    if major != API_VERSION[0] or minor > API_VERSION[1]:
        return f"it needs version {major}.{minor} of the contract, this core has {API_VERSION[0]}.{API_VERSION[1]}"
    return ""


def info_problem(module: Any, name: str) -> str:
    """What is wrong with the module's `INFO`, before anything else is asked of it."""
    info = getattr(module, "INFO", None)
    if not isinstance(info, PluginInfo):
        return "it has no INFO = PluginInfo(...)" if info is None else f"its INFO is a {type(info).__name__}, not a PluginInfo"
    if info.name != name:
        return f"its entry point is named {name!r} but its INFO.name is {info.name!r}; they must be equal"
    if not (isinstance(info.api, tuple) and len(info.api) == 2 and all(type(part) is int for part in info.api)):
        return f"INFO.api must be (major, minor), not {info.api!r}"
    if isinstance(info.op_namespaces, str) or not all(isinstance(space, str) and space.isidentifier() for space in info.op_namespaces):
        return f"INFO.op_namespaces must be a tuple of identifiers, not {info.op_namespaces!r}"
    reserved = RESERVED_NAMESPACES.intersection(info.op_namespaces)
    if reserved:
        return f"it claims the op namespace {min(reserved)!r}, which is reserved"
    return _config_problem(info.config) if info.config is not None else ""


def _config_problem(config: Any) -> str:
    from pydantic import BaseModel  # a plugin that has a model has imported pydantic already

    if not (isinstance(config, type) and issubclass(config, BaseModel)):
        return "INFO.config must be a pydantic model class"
    if config.model_config.get("extra") != "forbid":
        return f"its configuration {config.__name__} must set extra='forbid', or typing errors would pass unseen"
    return ""


def unmet(requirement: str) -> str:
    """Why a PEP 508 requirement is not met here, by installed metadata alone; the empty string if it is."""
    try:
        wanted = Requirement(requirement)
    except InvalidRequirement as error:
        return f"the requirement {requirement!r} cannot be read: {error}"
    if not _applies(wanted):
        return ""
    try:
        installed = importlib_metadata.version(wanted.name)
    except importlib_metadata.PackageNotFoundError:
        return f"{wanted.name} is not installed"
    if not wanted.specifier.contains(installed, prereleases=True):
        return f"{wanted.name}{wanted.specifier} is required, found {installed}"
    return ""


def unmet_requirements(found: Found) -> list[str]:
    """The distribution's own requirements that are not met: the usual reason why an import fails."""
    return [text for text in found.requires if unmet(text)]


def _applies(requirement: Requirement) -> bool:
    """Whether the requirement holds in this environment, and not only for an extra."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})
