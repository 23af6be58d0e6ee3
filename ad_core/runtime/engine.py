"""The engine: requests in, outputs out, one step at a time. Everything happens in the thread that calls it."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ad_core.api.errors import CacheAuditError, EngineClosedError, InvalidRequestError, PromptTooLongError, QueueFull, RequestFailedError
from ad_core.cache.manager import CacheManager
from ad_core.runtime.detokenizer import Vocabulary
from ad_core.runtime.executor import Executor
from ad_core.runtime.noise import mix64
from ad_core.runtime.outputs import FinishReason, RequestOutput
from ad_core.runtime.params import SamplingParams
from ad_core.runtime.request import Request
from ad_core.runtime.request import Sequence as Sample
from ad_core.runtime.sampler import Sampled, Sampler
from ad_core.runtime.scheduler import Scheduler, Work


@dataclass
class EngineStats:
    """What the engine has done since it was made."""

    steps: int = 0
    computed_tokens: int = 0
    """Tokens that went through the model, recomputed ones included."""
    sampled_tokens: int = 0
    reused_tokens: int = 0
    """Tokens of prompts that came from the cache, at every admission."""
    preemptions: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    """Samples by finish reason."""


class Engine:
    """Runs requests on an executor. Not thread-safe: one thread calls `submit`, `step`, `abort` and `close`.

    `num_pages` and `num_slots` are the sizes of the executor's pools, null units included. A request without a seed gets one
    that follows from the engine's `seed` and its turn, or a random one if that is None. Every request ends with exactly
    one output that is `finished`; `step` returns it.
    """

    def __init__(
        self,
        executor: Executor,
        num_pages: Sequence[int],
        num_slots: int = 0,
        *,
        eos_token_ids: Iterable[int] = (),
        tokenizer: Any = None,
        max_queued_requests: int = 1024,
        prefix_cache: bool = True,
        checkpoint_interval: int = 256,
        seed: int | None = None,
    ):
        limits = executor.limits
        self.executor, self.max_queued_requests = executor, max_queued_requests
        self.cache = CacheManager(
            executor.spec,
            num_pages,
            num_slots,
            prefix_reuse=prefix_cache,
            checkpoint_interval=checkpoint_interval,
            copy_slot=executor.copy_slot,
        )
        self.scheduler = Scheduler(self.cache, limits)
        self.sampler = Sampler(limits.max_sequences, executor.vocab_size, executor.last_ids.device)
        self.stats = EngineStats()
        self.max_length = min(limits.max_model_len, self.cache.capacity())
        """Tokens of the longest sequence, prompt and answer together, that the model and the cache allow."""
        self._eos = frozenset(index for index in eos_token_ids if 0 <= index < executor.vocab_size)
        self._vocabulary = Vocabulary(tokenizer) if tokenizer is not None else None
        self._seed = seed
        self._requests: dict[str, Request] = {}
        self._arrivals = 0
        self._ended: list[Request] = []
        """Finished outside of a step; the next one reports them."""
        self._closed: EngineClosedError | None = None

    # -- requests in --------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        stream: bool = False,
        prompt: str | None = None,
    ) -> str:
        """Queues a request and returns its id. With `stream` every step that brings it a token gives an output.

        A prompt of just `max_length` tokens ends at once, with reason "length". Raises `InvalidRequestError`,
        `PromptTooLongError`, `QueueFull` or `EngineClosedError`, and has then changed nothing.
        """
        self._refuse_if_closed()
        params = params or SamplingParams()
        ids = self.validate(prompt_ids, params)
        if request_id in self._requests:
            raise InvalidRequestError(f"a request with the id {request_id!r} is running", hint="give every request an id of its own")
        if self.num_waiting >= self.max_queued_requests:
            raise QueueFull(self.max_queued_requests, self.num_waiting)
        self._arrivals += 1
        request_id = f"request-{self._arrivals}" if request_id is None else request_id
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        request = Request(
            request_id,
            self._arrivals,
            ids,
            params,
            seed=self._seed_of(params),
            stop_ids=stop_ids,
            stream=stream,
            prompt=prompt,
            vocabulary=self._vocabulary,
        )
        self._requests[request_id] = request
        if params.max_tokens == 0 or len(ids) >= self.max_length:
            for sample in request.sequences:
                self._finish(sample, "length")
            self._ended.append(request)
        else:
            self.scheduler.add(request)
        return request_id

    def validate(self, prompt_ids: Sequence[int], params: SamplingParams) -> list[int]:
        """The prompt as plain ints, if it can be served. Raises as `submit` does. Safe to call from any thread."""
        try:
            array = np.asarray(prompt_ids)
        except ValueError:
            array = np.asarray("ragged")
        if array.size == 0:
            raise InvalidRequestError("the prompt is empty", hint="give at least one token; a BOS token will do")
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise InvalidRequestError("the prompt is not a flat sequence of token ids", why=f"it has the type {type(prompt_ids).__name__}")
        highest, vocab_size = max(int(array.max()), *params.stop_token_ids, 0), self.executor.vocab_size
        if array.min() < 0 or highest >= vocab_size:
            outside = int(array.min()) if array.min() < 0 else highest
            why = f"the model knows the ids 0 to {vocab_size - 1}"
            raise InvalidRequestError(f"token id {outside} is outside of the vocabulary", why=why)
        if len(array) > self.max_length:
            limit = self.executor.limits.max_model_len
            what = f"the model's {limit}" if self.max_length == limit else f"the cache's {self.max_length}"
            raise PromptTooLongError(
                f"the prompt has {len(array)} tokens, more than {what}",
                hint="shorten the prompt" if self.max_length == limit else "shorten the prompt, or raise `memory`",
            )
        ids: list[int] = array.tolist()
        return ids

    def abort(self, request_id: str) -> bool:
        """Ends a request where it is. Its pages are free at once; the next `step` gives its last output. False if unknown."""
        request = self._requests.get(request_id)
        if request is None or request.is_finished:
            return False
        self._end(request, "abort")
        self._ended.append(request)
        return True

    # -- outputs out --------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to report."""
        return bool(self._ended) or self.scheduler.has_work

    @property
    def failure(self) -> EngineClosedError | None:
        """What the engine died of, or that it was closed; None while it works."""
        return self._closed

    @property
    def num_waiting(self) -> int:
        """Requests of which nothing was computed yet."""
        return len(self.scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a lane."""
        return len(self.scheduler.running)

    def step(self) -> list[RequestOutput]:
        """Computes one step. Returns outputs of requests that ended, and of streamed ones that got a token.

        An exception on the way ends every request with an `EngineClosedError` that names it, and the engine refuses
        everything afterwards.
        """
        self._refuse_if_closed()
        try:
            touched = self._step() if self.scheduler.has_work else []
        except BaseException as cause:
            outputs = self._die(cause)
            if not isinstance(cause, Exception):
                raise
            return outputs
        outputs = [self._report(request) for request in self._ended]
        self._ended.clear()
        return outputs + [self._report(request) for request in touched if request.stream or request.is_finished]

    def generate(self, requests: Iterable[tuple[Sequence[int], SamplingParams]]) -> Iterator[RequestOutput]:
        """Runs requests at the queue's pace and yields the finished ones as they end. Others may be under way meanwhile;
        their outputs are not lost but yielded too. Left early, it aborts what it has begun."""
        feed, begun = iter(requests), set()
        pending = next(feed, None)
        try:
            while pending is not None or self.has_work:
                while pending is not None and self.num_waiting < self.max_queued_requests:
                    begun.add(self.submit(*pending))
                    pending = next(feed, None)
                yield from (output for output in self.step() if output.finished)
        finally:
            for request_id in begun & self._requests.keys():
                self.abort(request_id)

    def close(self) -> list[RequestOutput]:
        """Aborts what is under way and returns the last outputs. Everything is refused afterwards. May be called twice."""
        if self._closed is not None:
            return []
        for request_id in list(self._requests):
            self.abort(request_id)
        outputs = [self._report(request) for request in self._ended]
        self._ended.clear()
        self._closed = EngineClosedError("the engine was closed")
        return outputs

    # -- the step -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _step(self) -> list[Request]:
        plan = self.scheduler.schedule()
        if not plan.work:
            raise CacheAuditError("sequences wait, nothing runs, and still none can be admitted")
        for sample in plan.admitted:
            request = sample.request
            assert sample.cache is not None
            self.stats.reused_tokens += sample.cache.reuse.length
            self.sampler.add(
                sample.lane,
                request.params,
                seed=request.seed,
                sample=sample.index,
                tokens=sample.tokens,
                prompt_len=len(request.prompt_ids),
                stop_ids=sorted(request.stop_ids),
            )
        logits = self.executor.step([work.row() for work in plan.work])
        sampling = [work for work in plan.work if work.samples]
        sampled = self._sample(logits, sampling) if sampling else None
        self.stats.steps += 1
        self.stats.computed_tokens += sum(work.num_tokens for work in plan.work)
        self.stats.preemptions = self.scheduler.preemptions
        ids = sampled.ids_on_host() if sampled else []
        failed = {work.sequence.request for work, index in zip(sampling, ids, strict=True) if index < 0}
        for request in failed:
            why = "the model gave logits that are not finite numbers"
            self._end(request, "error", RequestFailedError(f"request {request.request_id} failed", why=why))
        for work in plan.work:
            if work.sequence.lane:
                self.scheduler.advance(work)
        for row, (work, index) in enumerate(zip(sampling, ids, strict=True)):
            if work.sequence.finish_reason is None and sampled:
                self._accept(work.sequence, index, sampled.logprobs_on_host(row))
        return list(dict.fromkeys(work.sequence.request for work in sampling))

    def _sample(self, logits: torch.Tensor, sampling: list[Work]) -> Sampled:
        lanes = [work.sequence.lane for work in sampling]
        sampled = self.sampler.sample(logits, lanes, [len(work.sequence.tokens) for work in sampling])
        self.executor.last_ids[lanes] = sampled.ids
        return sampled

    def _accept(self, sample: Sample, index: int, logprobs: dict[int, float] | None) -> None:
        """Adds a sampled token and ends the sample if that was its last. An error in here is the request's own."""
        request, params = sample.request, sample.request.params
        sample.tokens.append(index)
        self.stats.sampled_tokens += 1
        if request.first_token is None:
            request.first_token = time.monotonic()
        if logprobs is not None:
            sample.logprobs.append(logprobs)
        try:
            if index in request.stop_ids and sample.num_sampled >= params.min_tokens:
                self._finish(sample, "stop", index)
            elif (request.stream or params.stop) and sample.decode():
                self._finish(sample, "stop", sample.text.stopped_by)
            elif sample.num_sampled == params.max_tokens or len(sample.tokens) >= self.max_length:
                self._finish(sample, "length")
        except Exception as cause:
            self._fail_text(request, cause)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _finish(self, sample: Sample, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        self.scheduler.finish(sample, discard=reason == "error")
        try:
            sample.finish(reason, stop_reason)
        except Exception as cause:
            self._fail_text(sample.request, cause)
        else:
            self.stats.finished[reason] += 1

    def _end(self, request: Request, reason: FinishReason, error: EngineClosedError | RequestFailedError | None = None) -> None:
        """Ends all samples of a request that have not ended."""
        request.error = error
        for sample in request.sequences:
            if sample.finish_reason is None:
                self._finish(sample, reason)

    def _fail_text(self, request: Request, cause: Exception) -> None:
        error = RequestFailedError(f"request {request.request_id} failed", why=f"its text cannot be decoded: {cause!r}")
        error.__cause__ = cause
        self._end(request, "error", error)

    def _report(self, request: Request) -> RequestOutput:
        if request.is_finished:
            self._requests.pop(request.request_id, None)
        return request.output()

    def _die(self, cause: BaseException) -> list[RequestOutput]:
        self._closed = EngineClosedError("the engine died and refuses further work", why=repr(cause), hint="make a new engine")
        self._closed.__cause__ = cause
        for request in list(self._requests.values()):
            if not request.is_finished:
                self._end(request, "error", self._closed)
        self._ended.clear()
        return [self._report(request) for request in list(self._requests.values())]

    def _refuse_if_closed(self) -> None:
        if self._closed is not None:
            raise EngineClosedError(self._closed.what, why=self._closed.why, hint=self._closed.hint) from self._closed.__cause__

    def _seed_of(self, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed
        return secrets.randbits(64) if self._seed is None else mix64(mix64(self._seed) ^ self._arrivals)
