"""Whether a module can be answered token by token at all: what it says at a token must not change when others follow."""

from __future__ import annotations

import torch

from ad_core.capture.forward import LogitsOnly
from ad_core.capture.scope import inference_form, tensors_kept
from ad_core.capture.verify import Reference, distance, text_ids

LENGTH = 300
"""Tokens that are tried: enough to leave behind a chunk or a window of the usual size."""

BEGINNING = 9

_EXACT, _HALF = 1e-3, 4e-2
"""Rounding at another length stays below this, in float32 and float64 and in half precision."""


def contradiction(reference: Reference, dtype: torch.dtype) -> str | None:
    """How the unpatched module contradicts itself, if it does: no cache can then give its answers.

    It is run on some tokens, on their beginning and on their first half. Raises what it raises.
    """
    plain, device, longest = LogitsOnly(reference.module), reference.device, reference.max_length
    length = LENGTH if longest is None else min(LENGTH, longest - longest // 4)  # some models give away a few of their positions
    allowed = _EXACT if dtype in (torch.float32, torch.float64) else _HALF
    with inference_form(reference.module), tensors_kept(reference.module), torch.no_grad():
        vocabulary = plain(torch.zeros(1, 1, dtype=torch.long, device=device)).shape[-1]
        ids = text_ids(1, length, vocabulary, reference.special_ids).to(device)
        whole = plain(ids).float()
        for seen in (min(BEGINNING, length), length // 2 | 1):  # odd: no multiple of a chunk
            apart = distance(plain(ids[:, :seen]).float(), whole[:, :seen], dtype)
            if apart > allowed:
                break
        else:
            return None
        again = distance(plain(ids).float(), whole, dtype)
        if again > allowed:
            return f"its logits for the same {length} tokens differ by {again:.2g} between two runs: it draws random numbers"
        return f"its logits for {seen} tokens differ by {apart:.2g} when {length - seen} more follow: it looks ahead"
