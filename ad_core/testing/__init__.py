"""The conformance kit for plugins. Needs pytest. Only tests and a plugin's `testing.py` import it."""

import pytest

for _module in ("conformance", "kernel_checks", "op_checks", "subject"):
    pytest.register_assert_rewrite(f"ad_core.testing.{_module}")

from ad_core.testing.cases import TOLERANCE, Case  # noqa: E402
from ad_core.testing.conformance import MixerConformance, OpConformance, Report, run_checks  # noqa: E402
from ad_core.testing.harness import Harness, bind_arguments  # noqa: E402
from ad_core.testing.subject import Subject  # noqa: E402

__all__ = ["TOLERANCE", "Case", "Harness", "MixerConformance", "OpConformance", "Report", "Subject", "bind_arguments", "run_checks"]
