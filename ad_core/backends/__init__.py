"""Compile backends: from the last graph to something callable."""

from ad_core.api.loading import CompileBackend
from ad_core.backends.eager import EagerBackend

BACKENDS: tuple[CompileBackend, ...] = (EagerBackend(),)
"""The core's own; plugins add theirs."""
