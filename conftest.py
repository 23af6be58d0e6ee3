"""What the tests of the core and of every plugin share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

WEIGHTS = Path(os.environ.get("AD_WEIGHTS", Path(__file__).parent / ".weights"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of real weights that tools/fetch_weights.py fetches; `make test` does that first."""
    path = WEIGHTS / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip(f"{path.name} is not in {WEIGHTS}: run python tools/fetch_weights.py {WEIGHTS}")
    return path
