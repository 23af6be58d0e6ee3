"""Distributions that exist only for a test: a *.dist-info folder and the modules it names, on a path of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from ad_core.api import ENTRY_POINT_GROUP

GOOD = """
from ad_core.api import PluginInfo, hookimpl
INFO = PluginInfo(name={name!r}, api=(1, 0), op_namespaces=({namespace!r},))
@hookimpl
def ad_passes():
    return []
"""

Install = Callable[..., str]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder on `sys.path`. Modules imported from it are forgotten after the test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    for variable in ("AD_PLUGINS", "AD_DISABLE_PLUGINS", "AD_STRICT"):
        monkeypatch.delenv(variable, raising=False)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def install(site: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install("toy") makes a good plugin "toy" of the distribution "ad-toy"; every part can be given. What another test has imported
    under the same name does not count."""

    def install(
        name: str,
        source: str | None = None,
        *,
        distribution: str = "",
        version: str = "1.0",
        requires: Sequence[str] = (),
        groups: Sequence[str] = (ENTRY_POINT_GROUP,),
        module: str = "",
    ) -> str:
        distribution = distribution or f"ad-{name}"
        module = module or distribution.replace("-", "_") + "_plugin"
        text = GOOD.format(name=name, namespace=f"{module}_ops") if source is None else source
        monkeypatch.delitem(sys.modules, module, raising=False)
        (site / f"{module}.py").write_text(text)
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = [f"Name: {distribution}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
        (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
        (info / "entry_points.txt").write_text("\n".join(f"[{group}]\n{name} = {module}" for group in groups))
        return module

    return install


@pytest.fixture
def plugin() -> Callable[..., ModuleType]:
    """plugin("toy", ad_passes=[...]) is a module with that INFO whose hooks return these values, or call them."""
    from ad_core.api import PluginInfo, hookimpl

    def plugin(name: str, *, namespaces: Sequence[str] = (), module: str = "", **returned: object) -> ModuleType:
        made = ModuleType(module or f"ad_{name}_module")
        made.INFO = PluginInfo(name=name, api=(1, 0), op_namespaces=tuple(namespaces))  # type: ignore[attr-defined]
        for hook, value in returned.items():
            made.__dict__[hook] = hookimpl(_hook(hook, value))
        return made

    def _hook(name: str, value: object) -> Callable[[], object]:
        def hook() -> object:
            return value() if callable(value) and not isinstance(value, type) else value

        hook.__name__ = name
        return hook

    return plugin
