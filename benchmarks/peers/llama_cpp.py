"""Peer: llama.cpp with a BF16 GGUF, through llama-cpp-python's low-level API; a batch decodes in lock-step."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from peers.worker import Load, Timed, TimedBatch, serve

MICRO_BATCH = 512  # llama.cpp's own default: tokens of one pass through the graph


class LlamaCpp:
    """One model, one context for a single sequence and one for the batch. Everything is at llama.cpp's defaults but the sizes."""

    def __init__(self, load: Load):
        import llama_cpp

        self._api = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept alive: C holds only its address
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(load.gguf).encode(), llama_cpp.llama_model_default_params())
        if self._model is None:
            raise RuntimeError(f"llama.cpp refused {load.gguf}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._single = _Context(self, load.threads, sequences=1, length=load.longest)
        self._load = load
        self._many: _Context | None = None

    def one(self, prompt: list[int], new: int) -> Timed:
        context = self._single
        context.clear()
        timed = Timed()
        start = time.perf_counter()
        fed, position = [prompt], 0
        while len(timed.tokens) < new:
            (token,) = context.step(fed, position)
            position += len(fed[0])
            timed.tokens.append(token)
            timed.events.append((time.perf_counter() - start, len(timed.tokens)))
            fed = [[token]]
        return timed

    def batch(self, prompts: list[list[int]], new: int) -> TimedBatch:
        """Lock-step needs prompts of one length, which is what the benchmark sends."""
        if len({len(prompt) for prompt in prompts}) != 1:
            raise ValueError("the lock-step loop needs prompts of one length")
        if self._many is None:
            self._many = _Context(self, self._load.threads, sequences=self._load.max_requests, length=self._load.longest_in_batch)
        self._many.clear()
        tokens: list[list[int]] = [[] for _ in prompts]
        start = time.perf_counter()
        fed, position = prompts, 0
        for _ in range(new):
            chosen = self._many.step(fed, position)
            position += len(fed[0])
            for sequence, token in zip(tokens, chosen, strict=True):
                sequence.append(token)
            fed = [[token] for token in chosen]
        return TimedBatch(tokens=tokens, seconds=time.perf_counter() - start)

    def info(self) -> dict[str, Any]:
        return {"version": self._api.__version__, "settings": "BF16 GGUF, KV f16, lock-step batch", "system": self._system()}

    def _system(self) -> str:
        features: bytes = self._api.llama_print_system_info()
        return features.decode().strip(" |")


class _Context:
    """A llama.cpp context, its batch buffer, and greedy steps over it."""

    def __init__(self, engine: LlamaCpp, threads: int, sequences: int, length: int):
        self._api = api = engine._api
        self._vocab_size = engine._vocab_size
        capacity = sequences * length
        parameters = api.llama_context_default_params()
        parameters.n_ctx = capacity
        parameters.n_batch = capacity
        parameters.n_ubatch = MICRO_BATCH
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = api.llama_init_from_model(engine._model, parameters)
        if self._context is None:
            raise RuntimeError(f"llama.cpp made no context for {sequences} sequences of {length}")
        self._batch = api.llama_batch_init(capacity, 0, 1)

    def clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)

    def step(self, fed: list[list[int]], position: int) -> list[int]:
        """Feeds `fed[i]` to sequence i from `position` on; the greedy next token of each."""
        batch, count = self._batch, 0
        for sequence, tokens in enumerate(fed):
            for offset, token in enumerate(tokens):
                batch.token[count] = token
                batch.pos[count] = position + offset
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = sequence
                batch.logits[count] = offset == len(tokens) - 1
                count += 1
        batch.n_tokens = count
        if code := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode answered {code}")
        logits = np.ctypeslib.as_array(self._api.llama_get_logits(self._context), shape=(len(fed), self._vocab_size))
        chosen: list[int] = logits.argmax(axis=1).tolist()
        return chosen


if __name__ == "__main__":
    serve(LlamaCpp)
