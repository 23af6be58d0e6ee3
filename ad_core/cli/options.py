"""Options that every command with a model shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ad_core.api.errors import ConfigError

Model = Annotated[str, typer.Argument(help="A directory with config.json and safetensors, or a .gguf file.")]
Config = Annotated[Path | None, typer.Option(help="A TOML file with the options of LLM; flags win over it.")]
Device = Annotated[str | None, typer.Option(help='"auto", "cpu", "cuda", "cuda:1".')]
Dtype = Annotated[str | None, typer.Option(help='"auto", "float32", "bfloat16", "float16".')]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]
Memory = Annotated[str | None, typer.Option(help='For all pools together: bytes, or "2GiB".')]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any other option of LLM, KEY=VALUE with a TOML value; kernels.OP=NAME and plugins.NAME.KEY=VALUE too. Repeatable."
    ),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that lies in the model's directory.")]


def llm_options(
    config: Path | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    memory: str | None,
    settings: Sequence[str] | None,
    trust: bool,
) -> dict[str, Any]:
    """Keyword arguments for `LLM` (and, as overrides, for `load_config`). Raises `ConfigError` for a malformed `--set`."""
    given: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "memory": _size(memory),
        "trust_remote_code": trust or None,
    }
    for setting in settings or ():
        _put(given, setting)
    return {"config": config, **{name: value for name, value in given.items() if value is not None}}


def _size(memory: str | None) -> int | str | None:
    return int(memory) if memory is not None and memory.isdigit() else memory


def _put(given: dict[str, Any], setting: str) -> None:
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {setting!r} is not KEY=VALUE", hint="for example --set page_size=32")
    name, _, rest = key.partition(".")
    value = _toml(text)
    if name == "kernels" and rest:
        given.setdefault("kernels", {})[rest] = value
    elif name == "plugins" and rest.count("."):
        plugin, _, option = rest.partition(".")
        given.setdefault("plugins", {}).setdefault(plugin, {})[option] = value
    else:
        given[key] = value


def _toml(text: str) -> Any:
    """A TOML value; text that is none stands for itself, so that words need no quotes."""
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
