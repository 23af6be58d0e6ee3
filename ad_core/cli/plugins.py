"""`ad plugins`: what is installed and whether it can be used."""

from __future__ import annotations

from typing import Annotated

import typer

from ad_core.cli.listing import listing


def plugins(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the installed plugins, their state, and what to do about those that cannot be used."""
    typer.echo(listing(as_json))
