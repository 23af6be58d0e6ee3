"""`LLM`, the class that users meet: a model in, text out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ad_core.api.errors import InvalidRequestError, TokenizerMissingError
from ad_core.config import EngineConfig, load_config
from ad_core.pipeline import build
from ad_core.plan import Plan
from ad_core.progress import Bars, Progress, Silent
from ad_core.prompts import Prompt, PromptReader
from ad_core.runtime.engine import Engine, EngineStats
from ad_core.runtime.loop import EngineLoop
from ad_core.runtime.outputs import CompletionOutput, RequestOutput
from ad_core.runtime.params import SamplingParams
from ad_core.runtime.threads import in_own_thread
from ad_core.runtime.worker import Sink

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """An engine around one model.

    `model` is a directory in Hugging Face's form, a .gguf file, or an `nn.Module` in memory whose forward takes
    `(input_ids, position_ids=None)` and returns logits or an object with `.logits`; a module without a `.config` needs
    `max_model_len`, unless it looks positions up in a table, and `eos_token_id` if answers are to end by themselves. A module lends its
    weights and is left as it was.

    `max_batch_tokens` is the token budget of a step, and so the largest chunk of a prompt. `memory` is bytes or "2GiB", for
    all pools together. `plugins` holds options by plugin, `kernels` the kernel to use by canonical op. `config` is a TOML
    file with the same keys; arguments win over it. `progress` shows bars.

    Every method may be called from any thread. Close it, or use it as a context manager: `close` aborts what is under way.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        tokenizer: Any = None,
        config: str | Path | EngineConfig | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_batch_tokens: int | None = None,
        max_requests: int | None = None,
        max_queued_requests: int | None = None,
        max_model_len: int | None = None,
        page_size: int | None = None,
        memory: int | str | None = None,
        prefix_cache: bool | None = None,
        checkpoint_interval: int | None = None,
        plugins: Mapping[str, Mapping[str, Any]] | None = None,
        allow_plugins: Sequence[str] | None = None,
        deny_plugins: Sequence[str] | None = None,
        kernels: Mapping[str, str] | None = None,
        prefer: Sequence[str] | None = None,
        backend: str | None = None,
        verify: bool | None = None,
        trust_remote_code: bool | None = None,
        threads: int | None = None,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        progress: bool | Progress = False,
        **unknown: Any,
    ):
        given = {name: value for name, value in locals().items() if name in EngineConfig.model_fields} | unknown
        for name in ("allow_plugins", "deny_plugins", "prefer", "eos_token_id"):
            if isinstance(given[name], tuple):
                given[name] = list(given[name])
        if isinstance(config, EngineConfig):
            given = config.model_dump(exclude_unset=True) | {name: value for name, value in given.items() if value is not None}
            config = None
        self.config = load_config(config, given)
        self._progress = progress if not isinstance(progress, bool) else Bars() if progress else Silent()
        built = in_own_thread(lambda: build(model, self.config, tokenizer=tokenizer, progress=self._progress), "ad-start")
        self.plan: Plan = built.plan
        """What was captured, which kernels run and why, memory and seconds of the start."""
        self._source = built.source
        limits, sizes = built.model.limits, built.model.sizes
        engine = Engine(
            built.model,
            sizes.num_pages,
            sizes.num_slots,
            eos_token_ids=built.source.eos_token_ids,
            tokenizer=built.source.tokenizer(),
            max_queued_requests=self.config.max_queued_requests,
            prefix_cache=self.config.prefix_cache,
            checkpoint_interval=self.config.checkpoint_interval or limits.page_size,
            seed=self.config.seed,
        )
        self._reader = PromptReader(built.source.tokenizer, built.model.vocab_size)
        self._engine = engine
        self._loop = EngineLoop(engine)

    @property
    def tokenizer(self) -> Any | None:
        """The model's tokenizer, or None."""
        return self._source.tokenizer()

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence, prompt and answer together, that the model and the cache allow."""
        return self._engine.max_length

    @property
    def vocab_size(self) -> int:
        """Width of the logits: token ids are below it."""
        return self._engine.executor.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._engine.executor.last_ids.device

    @property
    def stats(self) -> EngineStats:
        """What the engine has done so far."""
        return self._engine.stats

    def generate(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> list[RequestOutput]:
        """Answers one prompt or a list of them, in order. `params` are for all, or one for each.

        Feeds the engine at the queue's pace and is never refused for a full queue. Raises `InvalidRequestError` (and its
        kin) before anything runs if one of the prompts cannot be served; a request that fails later has an `error` in
        its output and does not touch the others.
        """
        read, _ = self._reader.read_all(prompts)
        each = self._params_for(len(read), params)
        requests = [(prompt.ids, param) for prompt, param in zip(read, each, strict=True)]
        for ids, param in requests:
            self._engine.validate(ids, param)
        done = 0
        with self._progress.counting("answers", "prompts") as count:

            def finished(output: RequestOutput) -> None:
                nonlocal done
                done += 1
                count(done, len(requests))

            return self._loop.generate(requests, [prompt.text for prompt in read], on_finished=finished)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None) -> Iterator[RequestOutput]:
        """Answers one prompt and yields as text comes: `.outputs[i].delta` is what is new. The last output is `finished`.

        Raises `QueueFull` if the queue is at its limit. An iterator that is dropped aborts its request.
        """
        read = self._reader.read(prompt)
        return self._loop.stream(read.ids, self._checked(params), request_id, prompt=read.text)

    async def agenerate(self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None) -> RequestOutput:
        """Answers one prompt. Raises `QueueFull` if the queue is at its limit; a cancelled call aborts its request."""
        read = self._reader.read(prompt)
        return await self._loop.agenerate(read.ids, self._checked(params), request_id, prompt=read.text)

    def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """`stream` for coroutines."""
        read = self._reader.read(prompt)
        return self._loop.astream(read.ids, self._checked(params), request_id, prompt=read.text)

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None, sink: Sink) -> str:
        """Queues a prompt and returns its id at once. `sink` is called with each output in the engine's thread and must not
        block. Raises `QueueFull` if the queue is at its limit."""
        read = self._reader.read(prompt)
        return self._loop.submit(read.ids, self._checked(params), sink, request_id, stream=True, prompt=read.text)

    def abort(self, request_id: str) -> None:
        """Ends a request within a step; its last output has the finish reason "abort". Nothing happens if it has ended."""
        self._loop.abort(request_id)

    def close(self) -> None:
        """Aborts what is under way and ends the engine's thread. May be called twice."""
        self._loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        self.close()
        return False

    def _params_for(self, count: int, params: Params) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [self._checked(params)] * count
        if not isinstance(params, Sequence) or isinstance(params, str):
            return [self._checked(params)]
        if len(params) != count:
            raise InvalidRequestError(
                f"there are {count} prompts and {len(params)} sampling parameters", hint="give one for all, or one for each"
            )
        return [self._checked(each) for each in params]

    def _checked(self, params: SamplingParams | None) -> SamplingParams:
        """Raises `InvalidRequestError` for what are no parameters, `TokenizerMissingError` for what only text could fulfil."""
        if params is None:
            return SamplingParams()
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(
                f"sampling parameters cannot be a {type(params).__name__}", hint="give SamplingParams(temperature=0.7, ...)"
            )
        if params.stop and self.tokenizer is None:
            raise TokenizerMissingError(
                "stop strings were given and the model has no tokenizer, so it has no text to look for them in",
                hint="give stop_token_ids, or LLM(..., tokenizer=PATH or a tokenizer)",
            )
        return params
