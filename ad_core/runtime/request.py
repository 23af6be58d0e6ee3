"""A request and its samples while they live in the engine. Outputs are made of them; nobody outside sees them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ad_core.api.errors import AdError
from ad_core.cache.manager import SequenceCache
from ad_core.cache.reuse import Reuse
from ad_core.runtime.detokenizer import Detokenizer, Vocabulary
from ad_core.runtime.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from ad_core.runtime.params import SamplingParams
from ad_core.runtime.stops import AnswerText

__all__ = ["CompletionOutput", "Request", "RequestOutput", "Sequence"]


NOT_STARTED = Reuse(0, "the request never started")


@dataclass(eq=False)
class Sequence:
    """One sample of a request.

    The engine appends to `tokens` and sets the end; the scheduler owns `lane`, `cache` and `computed`. Waiting, the sequence has
    no lane (0) and no cache.
    """

    request: Request
    index: int
    tokens: list[int]
    """The prompt and what was sampled so far. The request's own list until the sequence runs."""
    lane: int = 0
    cache: SequenceCache | None = None
    sampled_here: bool = False
    """The last token was sampled on this lane, so the device has its id."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, float]] = field(default_factory=list)
    text: AnswerText = field(init=False)
    num_decoded: int = 0
    """Sampled tokens whose text was looked at."""
    sent: tuple[int, int] = (0, 0)
    """Tokens and characters that the request's last output showed."""
    _detokenizer: Detokenizer | None = None

    def __post_init__(self) -> None:
        self.text = AnswerText(self.request.params.stop, self.request.params.include_stop_str)

    @property
    def key(self) -> tuple[int, int]:
        """Order of arrival. The newest is the first to be preempted."""
        return self.request.arrival, self.index

    @property
    def num_sampled(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def remaining(self) -> int:
        """Tokens that are known and not computed: 1 for a sequence that decodes."""
        return len(self.tokens) - self.cache.computed if self.cache else len(self.tokens)

    def begin(self, lane: int, cache: SequenceCache) -> None:
        """The sequence runs from now on (again, after a preemption)."""
        request = self.request
        self.lane, self.cache = lane, cache
        if self.tokens is request.prompt_ids:
            self.tokens = list(request.prompt_ids)
        if request.started is None:
            request.started, request.reused = time.monotonic(), cache.reuse

    def decode(self, *, hidden: int = 0) -> bool:
        """Looks at the text of what was sampled since, but for the last `hidden` tokens. True if it completes a stop string."""
        ids = self.tokens[len(self.request.prompt_ids) + self.num_decoded : len(self.tokens) - hidden]
        self.num_decoded += len(ids)
        if not ids or self.request.vocabulary is None:
            return False
        if self._detokenizer is None:
            self._detokenizer = Detokenizer(self.request.vocabulary, self.request.prompt_ids, self.request.params.skip_special_tokens)
        return self.text.add(self._detokenizer.feed(ids), may_stop=self.num_sampled >= self.request.params.min_tokens)

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends the sample: what was held back of its text is shown, the text of a stop token only if that was asked for.

        With reason "error" nothing is decoded, so it cannot raise.
        """
        if self.text.stopped_by is None and reason != "error":
            self.decode(hidden=isinstance(stop_reason, int) and not self.request.params.include_stop_str)
            if self._detokenizer is not None:
                self.text.add(self._detokenizer.flush(), may_stop=False)
        self.text.close()
        self.finish_reason, self.stop_reason = reason, stop_reason

    def completion(self) -> CompletionOutput:
        """The sample as it is now; what it holds counts as sent."""
        tokens, characters = self.sent
        visible = self.text.visible
        self.sent = (self.num_sampled, len(visible))
        wants_logprobs = self.request.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=visible,
            token_ids=self.tokens[len(self.request.prompt_ids) :],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=self.logprobs.copy() if wants_logprobs else None,
            delta=visible[characters:],
            num_new_tokens=self.num_sampled - tokens,
        )


@dataclass(eq=False)
class Request:
    """A prompt, what was asked of it, and its samples."""

    request_id: str
    arrival: int
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    stream: bool = False
    prompt: str | None = None
    vocabulary: Vocabulary | None = None
    sequences: list[Sequence] = field(init=False)
    num_started: int = 1
    """Samples that the scheduler knows of: the further ones follow when the prompt is computed."""
    error: AdError | None = None
    reused: Reuse = NOT_STARTED
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.sequences = [Sequence(self, index, self.prompt_ids) for index in range(self.params.n)]

    @property
    def is_finished(self) -> bool:
        return all(sequence.finish_reason for sequence in self.sequences)

    def output(self) -> RequestOutput:
        finished = self.is_finished
        return RequestOutput(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_ids,
            outputs=[sequence.completion() for sequence in self.sequences],
            finished=finished,
            metrics=RequestMetrics(self.arrived, self.started, self.first_token, time.monotonic() if finished else None, self.preemptions),
            reused=self.reused,
            error=self.error,
            prompt=self.prompt,
        )
