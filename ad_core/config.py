"""What a person or a file may tell the engine. Strict: an unknown key is an error that names the nearest one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from ad_core.api.errors import ConfigError, nearest
from ad_core.api.types import PluginInfo

_UNITS = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(size: int | str) -> int:
    """Bytes of 1024, "512MiB", "2GiB", "1.5 GB". Raises `ConfigError` for anything else, and for nothing at all."""
    try:
        return _bytes(size)
    except ValueError as error:
        raise ConfigError(str(error), hint='write bytes as a number, or "512MiB", "2GiB", "1.5GB"') from None


def _bytes(size: object) -> int:
    if not isinstance(size, int | str):
        raise ValueError(f"{size!r} is not an amount of memory")
    match = _SIZE.fullmatch(str(size))
    unit = _UNITS.get(match[2].lower() or "b") if match else None
    if match is None or unit is None:
        raise ValueError(f"{size!r} is not an amount of memory")
    amount = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if amount < 1:
        raise ValueError("an amount of memory must be at least one byte")
    return amount


def _memory(value: object) -> object:
    return None if value is None or value == "auto" else _bytes(value)


def _plain(value: object) -> object:
    """`torch.bfloat16` and `torch.device("cpu")` say in text what they are; no import is needed to ask them."""
    return str(value).removeprefix("torch.") if type(value).__module__.split(".")[0] == "torch" else value


class EngineConfig(BaseModel):
    """The options of `LLM`, of `ad`'s commands and of a configuration file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    device: Annotated[str, BeforeValidator(_plain)] = "auto"
    """"auto", "cpu", "cuda", "cuda:1"."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_plain)] = "auto"
    """Of weights and activations; "auto" takes the checkpoint's."""
    max_batch_tokens: PositiveInt = 512
    """Tokens of one step over all sequences, and so the largest chunk of a prompt."""
    max_requests: PositiveInt = 64
    """Sequences that run at once."""
    max_queued_requests: PositiveInt = 1024
    """Requests that may wait; one more is refused with `QueueFull`."""
    page_size: PositiveInt = 16
    """Tokens a page."""
    memory: Annotated[int | None, BeforeValidator(_memory)] = None
    """Bytes for all pools; None takes a share of what is free."""
    max_model_len: PositiveInt | None = None
    """Longest sequence, prompt and answer together; None takes the model's own."""
    prefix_cache: bool = True
    checkpoint_interval: PositiveInt | None = Field(default=None, validate_default=True)
    """Tokens between two saved recurrent states, a multiple of `page_size`. Left out: 256, rounded up to whole pages."""
    plugins: dict[str, dict[str, Any]] = {}
    """Each plugin's own options, by plugin name."""
    allow_plugins: list[str] | None = None
    """Plugins or distributions that may be loaded; None allows all."""
    deny_plugins: list[str] = []
    """Plugins or distributions that are not even imported."""
    kernels: dict[str, str] = {}
    """The kernel to use for a canonical op: `"ad_mixer::op" = "mixer.kernel"`."""
    prefer: list[str] = []
    """Distributions, plugins or kernels that may serve an op that another plugin owns."""
    backend: str = "eager"
    """The compile backend."""
    verify: bool | None = None
    """Compare with the unchanged model: always, never, or (None) when the weights are small enough."""
    trust_remote_code: bool = False
    """Run code that lies in the model's directory."""
    threads: PositiveInt | None = None
    """CPU threads; None leaves the process's setting."""
    seed: NonNegativeInt = 0
    """Of requests that bring no seed of their own."""
    eos_token_id: int | list[int] | None = None
    """Ids that end a sequence; None takes the model's."""

    @model_validator(mode="after")
    def _whole_pages(self) -> EngineConfig:
        interval = self.checkpoint_interval
        if interval is None:
            object.__setattr__(self, "checkpoint_interval", -(-256 // self.page_size) * self.page_size)
        elif interval % self.page_size:
            raise ValueError(f"checkpoint_interval {interval} is not a multiple of page_size {self.page_size}")
        return self


def make_config(options: Mapping[str, Any], *, source: str = "the options") -> EngineConfig:
    """The configuration of plain options. Raises `ConfigError`, which names `source` and, for a typo, the nearest key."""
    try:
        return EngineConfig.model_validate(dict(options))
    except ValidationError as error:
        raise _explain(error, EngineConfig, source) from None


def load_config(path: Path | str | None = None, overrides: Mapping[str, Any] | None = None) -> EngineConfig:
    """The configuration of a TOML file and of flags, which win. Tables (`plugins`, `kernels`) are merged key by key.

    A flag that is None was not given. Raises `ConfigError`.
    """
    options = read_toml(Path(path)) if path is not None else {}
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    try:
        return make_config(_merged(options, given))
    except ConfigError:
        make_config(options, source=str(path))  # raises if the file alone is at fault, and then names it
        raise


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables. Raises `ConfigError` if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("the configuration file cannot be read", where=str(path), why=error.strerror or str(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("the configuration file is not TOML", where=str(path), why=str(error)) from error


def plugin_options(sections: Mapping[str, Mapping[str, Any]], infos: Iterable[PluginInfo]) -> dict[str, dict[str, Any]]:
    """Each loaded plugin's options, checked by its own model, defaults filled in: what passes and mixers are given.

    Raises `ConfigError` for the section of a plugin that is not loaded, and for what a plugin's model refuses.
    """
    known = {info.name: info for info in infos}
    for name in sections:
        if name not in known:
            raise ConfigError(
                f"there are options for the plugin {name!r}, which is not loaded",
                where=f"plugins.{name}",
                hint=_did_you_mean(name, known) or "`ad plugins` shows what is installed and why it may not be loaded",
            )
    options: dict[str, dict[str, Any]] = {}
    for name, info in known.items():
        section = dict(sections.get(name, {}))
        if info.config is None:
            if section:
                raise ConfigError(f"the plugin {name!r} takes no options", where=f"plugins.{name}", why=f"given: {', '.join(section)}")
            options[name] = {}
            continue
        try:
            options[name] = info.config.model_validate(section).model_dump()
        except ValidationError as error:
            raise _explain(error, info.config, "the plugin's options", ("plugins", name)) from None
    return options


def _did_you_mean(word: str, known: Iterable[str]) -> str | None:
    close = nearest(word, known)
    return f"did you mean {close!r}?" if close else None


def _explain(error: ValidationError, model: type[BaseModel], source: str, prefix: tuple[str, ...] = ()) -> ConfigError:
    """Pydantic's findings as one `ConfigError`, every key with its full path."""
    findings, hints = [], []
    for finding in error.errors(include_url=False):
        path = ".".join(map(str, (*prefix, *finding["loc"])))
        if finding["type"] == "extra_forbidden":
            known = _fields_at(model, finding["loc"][:-1])
            findings.append(f"unknown option {path!r}")
            hints.append(_did_you_mean(str(finding["loc"][-1]), known) or f"known are: {', '.join(sorted(known))}")
        else:
            message = finding["msg"].removeprefix("Value error, ")
            findings.append(f"{path}: {message}, got {finding['input']!r}" if path else message)
    what = findings[0] if len(findings) == 1 else f"{len(findings)} options cannot be used: " + "; ".join(findings)
    return ConfigError(what, where=source, hint="; ".join(hints) or None)


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Keys that are known at a place inside the model."""
    for step in location:
        annotation = model.model_fields[str(step)].annotation if str(step) in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return set()
        model = annotation
    return set(model.model_fields)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
