"""Kernels in C for the CPU: a plugin ships a source file, the machine that runs it compiles it once. Imports no torch."""

from ad_core.native.compiler import CannotCompile, find_compiler
from ad_core.native.library import NativeLibrary

__all__ = ["CannotCompile", "NativeLibrary", "find_compiler"]
