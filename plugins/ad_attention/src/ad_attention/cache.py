"""What softmax attention keeps: one entry a token in each pool."""

from __future__ import annotations

from ad_core.api import OpCall, PagedTokens


def page_resources(call: OpCall) -> dict[str, PagedTokens]:
    """`key_pages` [G, D] and `value_pages` [G, Dv] a token, and `key_bias_pages` [G] if keys have a bias.

    Nothing further back than a window is read again; a chunk never reaches back further than its own length.
    """
    limits = [limit for limit in (call["window"], call["chunk"]) if limit is not None]
    window = min(limits) if limits else None
    sources = {"key_pages": call["key"], "value_pages": call["value"], "key_bias_pages": call["key_bias"]}
    return {
        name: PagedTokens(tuple(int(extent) for extent in source.shape[2:]), source.dtype, window)
        for name, source in sources.items()
        if source is not None
    }
