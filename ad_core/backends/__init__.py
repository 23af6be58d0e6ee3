"""Compile backends: from the last graph to something callable."""

from ad_core.api.loading import CompileBackend
from ad_core.backends.eager import EagerBackend
from ad_core.backends.inductor import InductorBackend

BACKENDS: tuple[CompileBackend, ...] = (EagerBackend(), InductorBackend())
"""The core's own; plugins add theirs."""
