"""The thread that owns an engine. Other threads leave commands in its inbox; it hands every output to the request's sink."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ad_core.api.errors import EngineClosedError, InvalidRequestError, QueueFull
from ad_core.runtime.engine import Engine
from ad_core.runtime.outputs import RequestOutput
from ad_core.runtime.params import SamplingParams

Sink = Callable[[RequestOutput], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Submission:
    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    sink: Sink
    stream: bool
    prompt: str | None


class Worker:
    """Steps `engine` in a thread while there is work and sleeps while there is none.

    Whatever happens, every accepted request's sink gets one output that is `finished`. Sinks are called in the worker's
    thread and must not block; one that raises loses its request.
    """

    def __init__(self, engine: Engine, name: str):
        self._engine = engine
        self._changed = threading.Condition()
        """Guards what follows. It is never held during a step, so no caller waits for one."""
        self._inbox: deque[_Submission | str] = deque()
        self._num_incoming = 0
        self._live: dict[str, _Submission] = {}
        self._num_accepted = 0
        self._closing = False
        self._ended: EngineClosedError | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        sink: Sink,
        request_id: str | None,
        *,
        stream: bool,
        prompt: str | None,
        wait: bool,
    ) -> str:
        """Accepts a request, or raises as `Engine.submit` does. With `wait` a full queue is waited for instead."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._closing or self._ended or self._num_queued < self._engine.max_queued_requests)
            if self._closing or self._ended:
                raise self._closed_error()
            if self._num_queued >= self._engine.max_queued_requests:
                raise QueueFull(self._engine.max_queued_requests, self._num_queued)
            if request_id in self._live:
                raise InvalidRequestError(f"a request with the id {request_id!r} is running", hint="give every request an id of its own")
            self._num_accepted += 1
            request_id = f"request-{self._num_accepted}" if request_id is None else request_id
            self._live[request_id] = submission = _Submission(request_id, prompt_ids, params, sink, stream, prompt)
            self._inbox.append(submission)
            self._num_incoming += 1
            self._changed.notify_all()
        return request_id

    def abort(self, request_id: str) -> None:
        """Ends a request soon. Its sink gets the last output; nothing happens if it has ended."""
        with self._changed:
            if request_id in self._live:
                self._inbox.append(request_id)
                self._changed.notify_all()

    def close(self) -> None:
        """Aborts everything and ends the thread. May be called twice and from anywhere."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def _num_queued(self) -> int:
        return self._engine.num_waiting + self._num_incoming

    def _closed_error(self) -> EngineClosedError:
        ended = self._ended or EngineClosedError("the engine was closed")
        error = EngineClosedError(ended.what, why=ended.why, hint=ended.hint)
        error.__cause__ = ended.__cause__
        return error

    def _run(self) -> None:
        try:
            while self._read_inbox():
                self._deliver(self._engine.step())
                if self._engine.failure is not None:
                    self._ended = self._engine.failure
                    return
            self._deliver(self._engine.close())
        except BaseException as cause:
            self._ended = EngineClosedError("the engine's thread died and refuses further work", why=repr(cause), hint="make a new engine")
            self._ended.__cause__ = cause
            log.exception("the engine's thread died")
        finally:
            self._refuse_rest()

    def _read_inbox(self) -> bool:
        """Waits for something to do, and does what other threads asked for. False if it is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._inbox or self._engine.has_work)
            while self._inbox:
                command = self._inbox.popleft()
                if isinstance(command, str):
                    self._engine.abort(command)
                    continue
                self._num_incoming -= 1
                self._engine.submit(command.prompt_ids, command.params, command.request_id, stream=command.stream, prompt=command.prompt)
            self._changed.notify_all()
            return not self._closing

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            with self._changed:
                find = self._live.pop if output.finished else self._live.get
                submission = find(output.request_id, None)
            if submission is not None and not self._hand_over(submission, output) and not output.finished:
                with self._changed:
                    del self._live[output.request_id]
                self._engine.abort(output.request_id)

    def _hand_over(self, submission: _Submission, output: RequestOutput) -> bool:
        try:
            submission.sink(output)
        except Exception:
            log.warning("nobody takes the outputs of %s any more", output.request_id, exc_info=True)
            return False
        return True

    def _refuse_rest(self) -> None:
        """The thread ends: whoever still waits is told why."""
        with self._changed:
            self._closing = True
            error = self._closed_error()
            rest = list(self._live.values())
            self._live.clear()
            self._inbox.clear()
            self._num_incoming = 0
            self._changed.notify_all()
        for submission in rest:
            output = RequestOutput.refused(submission.request_id, submission.prompt_ids, submission.params.n, error, submission.prompt)
            self._hand_over(submission, output)
