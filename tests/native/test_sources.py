"""Every C file of the repository compiles here, without a warning: one that did not would only decline, and be slow in silence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ad_core.native import NativeLibrary, compiler

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("ad_core/**/*.c"), *ROOT.glob("plugins/*/src/**/*.c")])
PAIRS = {"native_prefill.c", "packed_linear.c", "packed_products.c", "pairs.c"}
"""Those that want instructions for pairs of bfloat16."""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_a_source_compiles_for_every_dtype_that_it_is_for(source, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-Wall", "-Wextra", "-Werror"))
    compiler._folder.cache_clear()
    library = NativeLibrary(source)
    for dtype in [torch.bfloat16] if source.name in PAIRS else [torch.float32, torch.bfloat16, torch.float16]:
        declined = library.declined(dtype)
        if declined is not None and "this processor has no instructions" in declined.reason:
            pytest.skip(declined.reason)
        assert declined is None
    compiler._folder.cache_clear()


def test_there_are_sources():
    assert len(SOURCES) >= 7
