"""`ad generate`: prompts in, answers out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ad_core.api.errors import ConfigError
from ad_core.cli import options

Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts; none reads one a line from --file or standard input.")]


def generate(
    model: options.Model,
    prompts: Prompts = None,
    file: Annotated[Path | None, typer.Option(help="A file with one prompt a line.")] = None,
    chat: Annotated[bool, typer.Option(help="Put each prompt into the model's chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with token ids and finish reasons.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Of the most likely tokens, as many as make up this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="The k most likely tokens; 0 is all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends an answer. Repeatable.")] = None,
    config: options.Config = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    memory: options.Memory = None,
    settings: options.Set = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Answers prompts. One prompt is streamed as it comes; several are answered together."""
    from ad_core.llm import LLM, SamplingParams

    texts = _prompts(prompts, file)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop or [])
    asked = [[{"role": "user", "content": text}] if chat else text for text in texts]
    with LLM(
        model, progress=sys.stderr.isatty(), **options.llm_options(config, device, dtype, threads, memory, settings, trust_remote_code)
    ) as llm:
        if len(asked) == 1 and not as_json:
            for output in llm.stream(asked[0], params):
                if output.error is not None:
                    raise output.error
                sys.stdout.write(output.outputs[0].delta)
                sys.stdout.flush()
            print()
            return
        failed = None
        for text, output in zip(texts, llm.generate(asked, params), strict=True):
            failed = failed or output.error
            answer = output.outputs[0]
            if as_json:
                print(_json(text, output.prompt_token_ids, answer.text, answer.token_ids, answer.finish_reason, output.error))
            else:
                print(f"> {text}\n{answer.text}\n")
        if failed is not None:
            raise failed


def _prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    if prompts and file is not None:
        raise ConfigError("prompts were given both as arguments and with --file", hint="give one of them")
    if prompts:
        return prompts
    if file is None and sys.stdin.isatty():
        raise ConfigError("there is no prompt", hint='ad generate MODEL "your prompt"')
    try:
        lines = (sys.stdin.read() if file is None else file.read_text(encoding="utf-8")).splitlines()
    except OSError as error:
        raise ConfigError("the file of prompts cannot be read", where=str(file), why=error.strerror or str(error)) from error
    if not (found := [line for line in lines if line.strip()]):
        raise ConfigError("there is no prompt", hint="every line that is not empty is one")
    return found


def _json(prompt: str, prompt_ids: list[int], text: str, ids: list[int], reason: str | None, error: Exception | None) -> str:
    import json

    answer = {"prompt": prompt, "prompt_tokens": len(prompt_ids), "text": text, "token_ids": ids, "finish_reason": reason}
    return json.dumps(answer | ({"error": str(error)} if error else {}), ensure_ascii=False)
