"""The command `ad`. A command is the function of its name in the module of its name; only the one that is called is imported."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ad_core.api.errors import AdError

if TYPE_CHECKING:
    import typer

COMMANDS = ("generate", "chat", "explain", "bench", "plugins", "doctor")
"""The core's own commands, in the order of the help. Plugins add theirs with the hook `ad_commands`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `ad` and exits the process. Our own errors end it with status 1 and their message, without a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words in (["plugins"], ["plugins", "--json"]):
            print(_listing("--json" in words), flush=True)
        else:
            build(_wanted(words))(args=words, prog_name="ad")
    except AdError as error:
        print(f"ad: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output has gone, `ad plugins | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def build(names: Iterable[str] | None = None) -> typer.Typer:
    """The application with these commands of the core, or (None) with all of them and those of plugins."""
    import typer

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.callback()(_root)
    for name in _present() if names is None else names:
        app.command(name)(_command(name))
    if names is None:
        _add_plugin_commands(app)
    return app


def _listing(as_json: bool) -> str:
    from ad_core.cli.listing import listing

    return listing(as_json)


def _wanted(words: Sequence[str]) -> tuple[str, ...] | None:
    """The command that is called, if it is one of the core's: then no other and no plugin need be loaded."""
    first = next(iter(words), "")
    return (first,) if first in _present() else None


def _root() -> None:
    """An unmodified causal language model in, an inference engine out."""


def _present() -> list[str]:
    return [name for name in COMMANDS if importlib.util.find_spec(f"ad_core.cli.{name}")]


def _command(name: str) -> Callable[..., None]:
    function: Callable[..., None] = getattr(importlib.import_module(f"ad_core.cli.{name}"), name)
    return function


def _add_plugin_commands(app: typer.Typer) -> None:
    from ad_core.registry import Registry

    for offer in Registry.load().commands():
        name = offer.item.info.name
        if name in COMMANDS:
            print(f"ad: the command {name!r} of {offer.distribution} is left out: the core has one of that name", file=sys.stderr)
            continue
        app.add_typer(offer.item, rich_help_panel=f"From {offer.distribution}")
