"""`ad chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ad_core.cli import options

HELP = "/reset forgets the conversation, /exit or end of input leaves, Ctrl-C stops an answer"


def chat(
    model: options.Model,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Of the most likely tokens, as many as make up this share.")] = 0.95,
    config: options.Config = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    memory: options.Memory = None,
    settings: options.Set = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Talks with a model. Answers stream, and the conversation so far is kept (and found in the prefix cache)."""
    from ad_core.llm import LLM, SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    opening = [{"role": "system", "content": system}] if system else []
    with LLM(
        model, progress=sys.stderr.isatty(), **options.llm_options(config, device, dtype, threads, memory, settings, trust_remote_code)
    ) as llm:
        history: list[dict[str, Any]] = list(opening)
        print(HELP)
        while (line := _ask()) is not None:
            if line == "/reset":
                history = list(opening)
                continue
            history.append({"role": "user", "content": line})
            answer = _answer(llm, history, params)
            if answer is None:
                history.pop()
            else:
                history.append({"role": "assistant", "content": answer})


def _ask() -> str | None:
    """The next line that says something; None when there is none to come."""
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        if line in ("/exit", "/quit"):
            return None
        if line:
            return line


def _answer(llm: Any, history: list[dict[str, Any]], params: Any) -> str | None:
    """Streams the answer and returns its text. A refused prompt is shown and gives None; an interrupted answer counts as far as it came."""
    from ad_core.api.errors import InvalidRequestError

    text = ""
    try:
        for output in llm.stream(history, params):
            if output.error is not None:
                raise output.error
            sys.stdout.write(output.outputs[0].delta)
            sys.stdout.flush()
            text = output.outputs[0].text
    except InvalidRequestError as error:
        print(f"{error}\n(/reset begins anew)", file=sys.stderr)
        return None
    except KeyboardInterrupt:
        pass
    print()
    return text
