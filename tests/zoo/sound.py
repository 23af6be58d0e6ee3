"""Whether an entry's own module can be an oracle: a later token changes nothing before it, and every token hears the first one."""

from __future__ import annotations

from torch import nn

from .check import TIE, logits_of
from .models import prompt

LENGTHS = (1, 2, 9, 33, 57)
"""Short of a window, a chunk or a page, and longer than several."""


def unsound(module: nn.Module) -> str | None:
    """Why a recompute of a longer sequence would not be what the module says of a shorter one, or None. No cache is used."""
    ids = prompt(LENGTHS[-1])
    whole = logits_of(module, ids)
    if not bool(whole.isfinite().all()):
        return "its logits are not finite"
    for length in LENGTHS:
        changed = [*ids[:length], *((token + 1) % 96 for token in ids[length:])]
        for what, other in (("a prefix", logits_of(module, ids[:length])), ("other tokens behind it", logits_of(module, changed)[:length])):
            worst = float((other - whole[:length]).abs().max())
            if not worst <= TIE:
                return f"with {what} the first {length} logits differ by {worst:.3g}: it is not causal"
    if float((logits_of(module, [ids[0] + 1, *ids[1:3]])[2] - whole[2]).abs().max()) <= TIE:
        return "the third token's logits do not depend on the first"
    return None
