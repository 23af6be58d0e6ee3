"""Peer: transformers `generate`, bf16, SDPA, its own dynamic cache; a batch is one padded `generate` call."""

from __future__ import annotations

import time
from typing import Any

from peers.worker import Load, Timed, TimedBatch, serve


class HfGenerate:
    """Loads the directory as a user would, with end-of-sequence switched off so that lengths are fixed."""

    def __init__(self, load: Load):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(load.threads)
        self._torch = torch
        self._version = transformers.__version__
        read = transformers.AutoModelForCausalLM.from_pretrained
        try:
            self._model = read(load.directory, dtype=torch.bfloat16, attn_implementation="sdpa")
        except ValueError:  # a model without attention knows no implementation of it
            self._model = read(load.directory, dtype=torch.bfloat16)
        self._model.eval()
        # Taking the id away is cheaper for `generate` than a minimum length, which masks logits at every step.
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def one(self, prompt: list[int], new: int) -> Timed:
        timed = _Stamps()
        self._generate([prompt], new, streamer=timed)
        return timed.finish()

    def batch(self, prompts: list[list[int]], new: int) -> TimedBatch:
        start = time.perf_counter()
        tokens = self._generate(prompts, new).tolist()
        return TimedBatch(tokens=tokens, seconds=time.perf_counter() - start)

    def info(self) -> dict[str, Any]:
        return {"version": self._version, "settings": "bf16, sdpa, dynamic cache"}

    def _generate(self, prompts: list[list[int]], new: int, streamer: Any = None) -> Any:
        """New tokens [B, new]. Shorter prompts are padded on the left and masked out."""
        torch = self._torch
        length = max(map(len, prompts))
        ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])  # [B, S]
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])  # [B, S]
        with torch.inference_mode():
            output = self._model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, streamer=streamer)
        return output[:, length:]


class _Stamps:
    """A streamer that reads the clock at each token. Its first call hands over the prompt and starts nothing."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._prompt_seen = False
        self._timed = Timed()

    def put(self, value: Any) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._timed.tokens.extend(value.tolist())
        self._timed.events.append((time.perf_counter() - self._start, len(self._timed.tokens)))

    def end(self) -> None:
        """Part of the streamer's interface; every token was stamped when it came."""

    def finish(self) -> Timed:
        return self._timed


if __name__ == "__main__":
    serve(HfGenerate)
