"""C files become functions here, or a reason why not; what is loaded was compiled by this user, from this text, for this processor."""

from __future__ import annotations

import os
import stat

import pytest
import torch

from ad_core.api import Declined
from ad_core.native import NativeLibrary, compiler

ADD = """
#include <stdint.h>
#ifdef _OPENMP
int omp_get_max_threads(void);
#endif
void add(const float *a, const float *b, float *out, int64_t count, float factor) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i++) out[i] = a[i] + factor * b[i];
}
void threads(int64_t *out) { *out = omp_get_max_threads(); }
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(compiler.SWITCH, raising=False)
    compiler._folder.cache_clear()
    yield tmp_path
    compiler._folder.cache_clear()


def library(folder, text=ADD):
    source = folder / "kernel.c"
    source.write_text(text)
    return NativeLibrary(source)


def objects(home):
    return sorted((home / "cache" / "ad-core" / "native").iterdir())


def test_a_function_computes_on_tensors_where_they_lie(home):
    add = library(home).function("add", "pppif", torch.float32)
    a, b, out = torch.arange(1000.0), torch.ones(1000), torch.empty(1000)
    add(a.data_ptr(), b.data_ptr(), out.data_ptr(), 1000, 0.5)
    assert torch.equal(out, a + 0.5)


def test_each_dtype_is_compiled_for_itself_and_others_are_a_reason(home):
    size = library(home, '#include "ad_native.h"\nvoid size(int64_t *out) { *out = SIZE; }\n')
    out = torch.zeros(1, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        size.function("size", "p", dtype)(out.data_ptr())
        assert out.item() == dtype.itemsize
    assert "do not know torch.float64" in size.declined(torch.float64).reason
    assert len(objects(home)) == 3


def test_its_threads_are_those_of_torch(home):
    threads, before = library(home).function("threads", "p", torch.float32), torch.get_num_threads()
    out = torch.zeros(1, dtype=torch.int64)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            threads(out.data_ptr())
            assert out.item() == count
    finally:
        torch.set_num_threads(before)


def test_a_text_is_compiled_once_and_another_text_anew(home, monkeypatch):
    assert library(home).declined(torch.float32) is None
    (first,) = objects(home)
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert library(home).declined(torch.float32) is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    assert library(home, ADD + "\n").declined(torch.float32) is None
    assert len(objects(home)) == 2
    assert first in objects(home)


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [("AD_NATIVE", "0", "switched off"), ("CC", "/no/such/compiler", "does not run"), ("CC", "/bin/false", "cannot compile kernel.c")],
)
def test_what_keeps_it_from_compiling_is_a_reason(home, monkeypatch, setting, value, reason):
    compiler._version.cache_clear()
    monkeypatch.setenv(setting, value)
    declined = library(home).declined(torch.float32)
    assert isinstance(declined, Declined)
    assert reason in declined.reason


def test_no_compiler_is_a_reason(home, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    assert "no C compiler" in library(home).declined(torch.float32).reason


def test_a_mistake_in_the_text_is_a_reason_that_names_it_and_leaves_nothing(home):
    assert "kernel.c" in library(home, "void f(").declined(torch.float32).reason
    assert objects(home) == []


def test_what_somebody_else_could_have_written_is_not_loaded(home):
    folder = home / "cache" / "ad-core" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert library(home).declined(torch.float32) is None
    assert objects(home) == []
    own = compiler._folder()
    assert own != folder
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert own.stat().st_uid == os.getuid()
