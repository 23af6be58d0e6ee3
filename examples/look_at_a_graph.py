"""The canonical graph of a model, around the first op that a plugin claimed.

    python examples/look_at_a_graph.py MODEL [--lines 6]

MODEL is a directory, or a GGUF file.
"""

from __future__ import annotations

import argparse
import re

import ad_core


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lines", type=int, default=6, help="lines before and after the op")
    options = parser.parse_args()
    compiled = ad_core.compile(options.model)
    print(f"{len(compiled.graph.graph.nodes)} nodes; around the first of {len(compiled.plan.claims)} claimed ops:\n")
    claim = compiled.plan.claims[0]
    lines = compiled.graph.code.splitlines()
    place = next(index for index, line in enumerate(lines) if line.strip().startswith(f"{claim.node} ="))
    for line in lines[max(0, place - options.lines) : place + options.lines + 1]:
        print(readable(line))
    print(f"\n{claim.module}: {claim.op}, by {claim.by}")


def readable(line: str) -> str:
    """A line of fx's code without the deletions and the prefix of every op."""
    line = re.sub(r";  .*", "", line).replace("torch.ops.", "")
    return re.sub(r'getattr\((self[\w.]*), "(\d+)"\)', r"\1.\2", line)


if __name__ == "__main__":
    main()
