"""Whether a model directory's own code may run. This is the only place that reads `trust_remote_code`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ad_core.api.errors import RemoteCodeError


def check_remote_code(path: Path, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Raises `RemoteCodeError` if the directory can only be opened by running its own code and the user did not allow it.

    A directory that brings code for a type that transformers knows is opened with transformers' code unless the user allows its own.
    """
    wanted = config.get("auto_map") or {}
    if not wanted or trust_remote_code:
        return
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if kind in CONFIG_MAPPING and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    files = sorted({f"{_module(value)}.py" for value in wanted.values()})
    raise RemoteCodeError(
        f"the model wants to run code of its own: {', '.join(files)}",
        where=str(path),
        why=f"transformers has no code for model_type {kind!r}; auto_map in config.json names {', '.join(sorted(map(str, wanted)))}",
        hint="read these files, and if you trust them give trust_remote_code=True (--trust-remote-code)",
    )


def _module(reference: Any) -> str:
    first = reference[0] if isinstance(reference, (list, tuple)) else reference
    return str(first).rpartition(".")[0].replace(".", "/")
