"""What a request gives back. Plain data: an output never changes after it was handed out."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

from ad_core.api.errors import AdError
from ad_core.cache.reuse import Reuse

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class CompletionOutput:
    """One sample, as far as it is.

    `token_ids` holds every sampled id, that of an end-of-sequence token too; `text` ends before a stop string. `delta` is the
    text that is new since the request's last output, `num_new_tokens` how many ids are.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or the id that ended the sample."""
    logprobs: list[dict[int, float]] | None = None
    """For each token: log-probability by id, its own first, then the most likely ones. Before penalties and temperature."""
    delta: str = ""
    num_new_tokens: int = 0


@dataclass(frozen=True)
class RequestMetrics:
    """Times in seconds of `time.monotonic`; None for what has not happened."""

    arrived: float
    started: float | None = None
    """First step with a token of the request."""
    first_token: float | None = None
    finished: float | None = None
    preemptions: int = 0


@dataclass(frozen=True)
class RequestOutput:
    """A request, as far as it is. Each has exactly one output that is `finished`, and it is the last."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    reused: Reuse
    """Tokens of the prompt that came from the cache, and why not more."""
    error: AdError | None = None
    """Why the request failed, if the finish reason is "error"."""
    prompt: str | None = None
    """The prompt as text, if it was given so."""

    @property
    def text(self) -> str:
        """The first sample's text."""
        return self.outputs[0].text

    @property
    def delta(self) -> str:
        """The first sample's new text."""
        return self.outputs[0].delta

    def after(self, unread: RequestOutput | None) -> RequestOutput:
        """This output, with the deltas of an earlier one that nobody has read."""
        if unread is None:
            return self
        outputs = [
            replace(new, delta=old.delta + new.delta, num_new_tokens=old.num_new_tokens + new.num_new_tokens)
            for old, new in zip(unread.outputs, self.outputs, strict=True)
        ]
        return replace(self, outputs=outputs)

    @classmethod
    def refused(cls, request_id: str, prompt_ids: list[int], n: int, error: AdError, prompt: str | None) -> RequestOutput:
        """The one output of a request that was accepted and never reached the engine."""
        outputs = [CompletionOutput(index, "", [], "error") for index in range(n)]
        metrics = RequestMetrics(arrived=time.monotonic(), finished=time.monotonic())
        return cls(request_id, prompt_ids, outputs, True, metrics, Reuse(0, "the request never started"), error, prompt)
