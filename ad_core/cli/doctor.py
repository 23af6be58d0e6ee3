"""`ad doctor`: whether this installation is healthy, and the line that mends what is not. Calls every hook."""

from __future__ import annotations

import json
import platform
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import importlib_metadata
import typer
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from ad_core.api.types import API_VERSION, ENTRY_POINT_GROUP
from ad_core.cli.listing import quiet_registry, table
from ad_core.native import CannotCompile, find_compiler
from ad_core.registry import Registry, State
from ad_core.registry.discovery import installed_as_source
from ad_core.registry.gates import core_version, unmet
from ad_core.registry.records import pip_install


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `fix` is what to do if it is not "ok"; an "error" sets the exit status."""

    level: Literal["ok", "note", "error"]
    subject: str
    what: str
    fix: str = ""
    detail: str = ""


def doctor(
    name: Annotated[str, typer.Argument(help="Only this plugin or distribution, with its traceback.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the interpreter, the libraries and every plugin; exit with status 1 if something needs mending."""
    findings = list(examine(quiet_registry()))
    if name:
        findings = [finding for finding in findings if name in finding.subject.split()]
        if not findings:
            findings = [Finding("error", name, "nothing installed has this name", "`ad plugins` lists what is installed")]
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        rows: list[tuple[str, ...]] = [(finding.level, finding.subject, finding.what) for finding in findings]
        for line, finding in zip(table(rows), findings, strict=True):
            typer.echo(line)
            if finding.fix:
                typer.echo(f"       -> {finding.fix}")
            if name and finding.detail:
                typer.echo(finding.detail)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


def examine(registry: Registry) -> Iterator[Finding]:
    """Everything that can be said without a model."""
    yield Finding("ok", "python", f"{platform.python_version()} at {sys.executable}")
    yield Finding("ok", "ad-core", f"{core_version()}, contract {API_VERSION[0]}.{API_VERSION[1]}, group {ENTRY_POINT_GROUP}")
    for text in importlib_metadata.requires("ad-core") or ():
        reason = unmet(text)
        if reason:
            yield Finding("error", "ad-core", reason, pip_install(text.partition(";")[0].strip()))
    yield from _libraries()
    yield _compiler()
    yield from _plugins(registry)
    yield from _seams(registry)
    yield from _stale_sources()


def _libraries() -> Iterator[Finding]:
    for library in ("torch", "transformers", "triton"):
        try:
            yield Finding("ok", library, importlib_metadata.version(library))
        except importlib_metadata.PackageNotFoundError:
            if library == "triton":
                yield Finding("note", library, "not installed; kernels that need it decline")
    try:
        import torch

        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("ok", "cuda", ", ".join(devices) or "no device; everything runs on the CPU")
    except Exception as error:  # a broken driver or library is what the doctor is asked about
        yield Finding("error", "torch", f"its import raised {type(error).__name__}: {error}", pip_install("torch"))


def _compiler() -> Finding:
    try:
        return Finding("ok", "native", f"{find_compiler()} compiles kernels for this CPU")
    except CannotCompile as reason:
        return Finding("note", "native", f"{reason}; kernels in C decline", "install gcc or clang")


def _plugins(registry: Registry) -> Iterator[Finding]:
    records = registry.check()
    if not records:
        yield Finding("note", "plugins", "none is installed: no model with a token mixer can be compiled", pip_install("ad-attention"))
    for record in records:
        subject = record.name if record.name == record.distribution else f"{record.name} {record.distribution}"
        if record.state is State.LOADED:
            yield Finding("ok", subject, f"{record.version}, loaded, every hook answers")
        elif record.state is State.BLOCKED:
            yield Finding("note", subject, f"{record.version}, blocked: {record.reason}", record.fix)
        else:
            fix = pip_install(record.distribution) if f"ad doctor {record.name}" in record.fix else record.fix
            yield Finding("error", subject, f"{record.version}, {record.state}: {record.reason}", fix, record.traceback)


def _seams(registry: Registry) -> Iterator[Finding]:
    """Seams that are not used because transformers has moved past (or not reached) the versions they are known for."""
    try:
        installed = importlib_metadata.version("transformers")
    except importlib_metadata.PackageNotFoundError:
        return
    for offer in registry.seams():
        try:
            holds = SpecifierSet(offer.item.transformers).contains(installed, prereleases=True)
        except InvalidSpecifier:
            what = f"the seam {offer.item.name} names no versions: {offer.item.transformers!r}"
            yield Finding("error", f"{offer.plugin} {offer.distribution}", what)
            continue
        if not holds:
            what = f"the seam {offer.item.name} is for transformers {offer.item.transformers}, found {installed}: it is not used"
            yield Finding("note", f"{offer.plugin} {offer.distribution}", what, pip_install(offer.distribution))


def _stale_sources() -> Iterator[Finding]:
    """Editable installs whose metadata no longer says what their pyproject.toml says."""
    for distribution, folder in installed_as_source():
        try:
            project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        except (OSError, KeyError, tomllib.TOMLDecodeError):
            fix = f"{sys.executable} -m pip uninstall {distribution.name}"
            yield Finding("error", distribution.name, f"its source at {folder} is gone or unreadable", fix)
            continue
        reasons = list(_differences(distribution, project))
        if reasons:
            yield Finding("error", distribution.name, "; ".join(reasons), f"{sys.executable} -m pip install --no-deps -e {folder}")


def _differences(distribution: Any, project: dict[str, Any]) -> Iterator[str]:
    version = project.get("version", distribution.version)
    if version != distribution.version:
        yield f"its source is version {version}, installed is {distribution.version}"
    for group, entries in project.get("entry-points", {}).items():
        installed = {entry.name: entry.value for entry in distribution.entry_points if entry.group == group}
        if installed != entries:
            yield f"its entry points in {group} have changed since it was installed"
