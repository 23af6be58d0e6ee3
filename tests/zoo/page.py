"""The table of what works: `docs/support.md` from the results of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .models import Entry

_HEAD = """# Which models work

Every causal language model type of transformers that is tried, tiny and with random weights in float32: captured, served by the engine
(three prompts of 1, 9 and 33 tokens together, chunks of 8, pages of 4, states saved every 16 tokens), its 24 greedy tokens compared
with a full recompute by the author's module, then saved, loaded from disk and its logits compared once more.
`make zoo` writes this page.

* *captured by*: **seam** where the author's library lets the operation be put in, **pattern** where it was found in the exported graph.
* *mixers*: the canonical operations that the plan claims, and how many of each.
* *status*: **works**, **fails**, or **upstream**: the module cannot be built or run as a language model, or what it says at a token
  changes when others follow, so that nothing could answer token by token as it does.
* *stage*: the first that failed. `build`: the module itself cannot be made; `capture`: no way in led to a graph that is the module;
  `greedy`: a token differs; `disk`: logits differ once the weights have been on disk.
"""


def page(entries: Mapping[str, Entry], results: Mapping[str, Mapping[str, Any]], versions: str) -> str:
    """The page's text. Entries without a result are said to be so."""
    rows = [_row(entry, results.get(name)) for name, entry in entries.items()]
    counts = Counter(_status(entry, results.get(name)) for name, entry in entries.items())
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in ("works", "fails", "upstream", "not run") if counts[kind])
    header = ("| model type | status | mixers | captured by | stage | reason |", "|---|---|---|---|---|---|")
    return "\n".join((_HEAD, f"With {versions}: {summary}.", "", *header, *rows, ""))


def _row(entry: Entry, result: Mapping[str, Any] | None) -> str:
    result = result or {}
    mixers = ", ".join(f"`{name}` x {count}" for name, count in sorted(result.get("mixers", {}).items()))
    reason = _short(result.get("reason", ""))
    if entry.status != "ok" and result.get("status") != "pass":
        reason = _short(entry.note)
    cells: Sequence[str] = (
        entry.model_type,
        _status(entry, result),
        mixers or "-",
        ", ".join(result.get("captured_by", ())) or "-",
        result.get("stage", "") or "-",
        reason or "-",
    )
    return f"| {' | '.join(cells)} |"


def _status(entry: Entry, result: Mapping[str, Any] | None) -> str:
    if not result:
        return "not run"
    if result["status"] == "pass":
        return "works"
    return "fails" if entry.status == "ok" and result["status"] != "upstream" else "upstream"


def _short(text: str, limit: int = 240) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
