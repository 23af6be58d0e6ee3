"""From a C file to a shared object for this very machine, kept for the next process."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SWITCH = "AD_NATIVE"
"""Environment variable: "0" means that nothing is compiled and nothing compiled is loaded."""

FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-strict-aliasing"),
    # Sums may be taken in another order, which vectors need. Infinities and NaN keep their meaning: they mask.
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
)
INCLUDE = Path(__file__).with_name("include")
"""Folder of `ad_native.h`, which sources may include."""
TIMEOUT = 120


class CannotCompile(Exception):
    """There is no shared object, and this is why."""


def find_compiler() -> str:
    """The C compiler to call. Raises `CannotCompile` where nothing may or can be compiled."""
    if os.environ.get(SWITCH) == "0":
        raise CannotCompile(f"native kernels are switched off ({SWITCH}=0)")
    if sys.platform != "linux":
        raise CannotCompile(f"native kernels are built on Linux, and this is {sys.platform}")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CannotCompile("there is no C compiler (cc, gcc or clang; CC names another)")
    return compiler


def shared_object(source: Path, kind: str) -> Path:
    """The compiled form of `source` for one kind of number, from the cache of this user or made now. Raises `CannotCompile`."""
    compiler, flags = find_compiler(), [*FLAGS, f"-DKIND={kind}"]
    texts = [path.read_text() for path in (source, *sorted(INCLUDE.iterdir()))]
    key = hashlib.sha256("\0".join([*texts, *flags, _version(compiler), _processor()]).encode()).hexdigest()[:32]
    target = _folder() / f"{source.stem}-{kind.lower()}-{key}.so"
    if not target.exists():
        _compile([compiler, *flags], source, target)
    return target


def _compile(compiler: list[str], source: Path, target: Path) -> None:
    """Two steps, because OpenMP's functions are not linked: they come from the library that torch has loaded, whose threads torch owns."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        half, whole = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        for command in (
            [*compiler, "-I", str(INCLUDE), "-c", str(source), "-o", str(half)],
            [compiler[0], "-shared", str(half), "-o", str(whole), "-lm"],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise CannotCompile(f"{compiler[0]} does not run: {error}") from error
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise CannotCompile(f"{compiler[0]} cannot compile {source.name}: {lines[0]}")
        os.replace(whole, target)  # two processes may do this at once: either file is right


@cache
def _folder() -> Path:
    """Where shared objects are kept: a folder that nobody else can write to, because what lies there is run."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "ad-core" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # no home, or a read-only one
    return Path(tempfile.mkdtemp(prefix="ad-core-native-"))


@cache
def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(f"{compiler} does not run: {error}") from error


@cache
def _processor() -> str:
    """What "native" stands for: a home directory may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})])
