"""What compiled Triton kernels may use of an SM, written down and checked without a GPU.

    python -m ad_core.testing.triton_budget MODULE [--write]

MODULE has `variants()`, calls by name that launch kernels, and `BUDGET`, the path of a JSON file. A budget is a ratchet: more
registers or shared memory than written down is a regression that somebody must look at, and then write down.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import triton

from ad_core.testing.triton import HOPPER, SHARED_LIMIT, CompiledLaunch, compiled_launches

MEASURES = ("num_warps", "registers", "local_bytes", "shared_bytes")

Usage = dict[str, int]


def measure(call: Callable[[], object], arch: int = HOPPER) -> dict[str, CompiledLaunch]:
    """Compiles what `call` launches; the launches by kernel name, and of several with one name the hungriest."""
    with compiled_launches(arch) as compiled:
        call()
    return {launch.kernel: launch for launch in sorted(compiled, key=lambda launch: (launch.local_bytes, launch.registers))}


def usage(launch: CompiledLaunch) -> Usage:
    return {name: getattr(launch, name) for name in MEASURES}


def complaints(variant: str, measured: Mapping[str, Usage], budget: Path) -> list[str]:
    """What breaks the budget, or the limits that hold for every kernel. Empty if all is well.

    Numbers of another release of Triton than the budget's own are only held against the limits: its compiler differs.
    """
    written = json.loads(budget.read_text())
    found = []
    for kernel, uses in measured.items():
        if uses["local_bytes"] > 0:
            found.append(f"{variant}/{kernel} spills: {uses['local_bytes']} bytes of local memory a thread")
        if uses["shared_bytes"] > SHARED_LIMIT:
            found.append(f"{variant}/{kernel} needs {uses['shared_bytes']} bytes of shared memory, an SM has {SHARED_LIMIT}")
        if written["triton"] != triton.__version__:
            continue
        allowed = written["kernels"].get(variant, {}).get(kernel)
        if allowed is None:
            found.append(f"{variant}/{kernel} is not in {budget.name}: write it with --write")
        else:
            found += [
                f"{variant}/{kernel}: {name} is {uses[name]}, the budget is {allowed[name]}"
                for name in ("registers", "shared_bytes")
                if uses[name] > allowed[name]
            ]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ad_core.testing.triton_budget", description=__doc__.splitlines()[0])
    parser.add_argument("module", help="a module with variants() and BUDGET")
    parser.add_argument("--write", action="store_true", help="take what is measured as the new budget")
    options = parser.parse_args(arguments)
    module = importlib.import_module(options.module)
    measured = {name: {kernel: usage(launch) for kernel, launch in measure(call).items()} for name, call in module.variants().items()}
    if options.write:
        text = json.dumps({"triton": triton.__version__, "arch": HOPPER, "kernels": measured}, indent=1)
        module.BUDGET.write_text(text + "\n")
    found = [complaint for name, uses in measured.items() for complaint in complaints(name, uses, module.BUDGET)]
    for name, uses in measured.items():
        for kernel, numbers in uses.items():
            print(f"{name:28} {kernel:16} " + "  ".join(f"{key} {value}" for key, value in numbers.items()))
    for complaint in found:
        print(complaint, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
