"""An engine for many callers: threads and coroutines submit, one background thread steps."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue

from ad_core.runtime.engine import Engine
from ad_core.runtime.mailbox import AsyncMailbox, Mailbox
from ad_core.runtime.outputs import RequestOutput
from ad_core.runtime.params import SamplingParams
from ad_core.runtime.worker import Sink, Worker


class EngineLoop:
    """Owns `engine` from here on: nobody else may call it. All methods are thread-safe.

    Refusals (`InvalidRequestError`, `PromptTooLongError`, `QueueFull`, `EngineClosedError`) are raised where a request is
    made; what befalls it later comes as `error` of its last output. `close`, or dropping the last reference, ends the thread.
    """

    def __init__(self, engine: Engine, name: str = "ad-engine"):
        self.engine = engine
        self._worker = Worker(engine, name)
        self._finalizer = weakref.finalize(self, self._worker.close)

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None,
        sink: Sink,
        request_id: str | None = None,
        *,
        stream: bool = False,
        prompt: str | None = None,
        wait: bool = False,
    ) -> str:
        """Queues a request and returns its id; `sink` is called with each output in the engine's thread and must not block.

        With `wait` a full queue is waited for instead of raising `QueueFull`.
        """
        params = params or SamplingParams()
        ids = self.engine.validate(prompt_ids, params)
        return self._worker.submit(ids, params, sink, request_id, stream=stream, prompt=prompt, wait=wait)

    def abort(self, request_id: str) -> None:
        """Ends a request within a step. Its last output has finish reason "abort"; nothing happens if it has ended."""
        self._worker.abort(request_id)

    def generate(
        self,
        requests: Iterable[tuple[Sequence[int], SamplingParams | None]],
        prompts: Sequence[str | None] | None = None,
        on_finished: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Runs all requests at the queue's pace, never refused for a full queue. Outputs are in the order of the requests.

        `prompts` are the prompts as text, for the outputs. `on_finished` is called in this thread. If it or a request raises,
        or the caller is interrupted, what has begun is aborted.
        """
        arrived: SimpleQueue[RequestOutput] = SimpleQueue()
        order: list[str] = []
        done: dict[str, RequestOutput] = {}

        def take(output: RequestOutput) -> None:
            done[output.request_id] = output
            if on_finished is not None:
                on_finished(output)

        try:
            for index, (ids, params) in enumerate(requests):
                order.append(self.submit(ids, params, arrived.put, prompt=prompts[index] if prompts else None, wait=True))
                while not arrived.empty():
                    take(arrived.get())
            while len(done) < len(order):
                take(arrived.get())
        finally:
            for request_id in order:
                if request_id not in done:
                    self.abort(request_id)
        return [done[request_id] for request_id in order]

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None, request_id: str | None = None, *, prompt: str | None = None
    ) -> Iterator[RequestOutput]:
        """Outputs as they come; the last is `finished`. The request begins with the first one asked for. Left early, it is aborted."""
        mailbox = Mailbox()
        request_id = self.submit(prompt_ids, params, mailbox.put, request_id, stream=True, prompt=prompt)
        finished = False
        try:
            while not finished:
                output = mailbox.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self.abort(request_id)

    async def astream(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None, request_id: str | None = None, *, prompt: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """`stream` for coroutines. A cancelled reader's request is aborted."""
        mailbox = AsyncMailbox()
        request_id = self.submit(prompt_ids, params, mailbox.put, request_id, stream=True, prompt=prompt)
        finished = False
        try:
            while not finished:
                output = await mailbox.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self.abort(request_id)

    async def agenerate(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None, request_id: str | None = None, *, prompt: str | None = None
    ) -> RequestOutput:
        """The finished output of one request. Cancelled, it aborts the request."""
        mailbox = AsyncMailbox()
        request_id = self.submit(prompt_ids, params, mailbox.put, request_id, prompt=prompt)
        try:
            return await mailbox.get()
        finally:
            self.abort(request_id)

    def close(self) -> None:
        """Aborts everything, ends the thread and waits for it. May be called twice."""
        self._finalizer()
