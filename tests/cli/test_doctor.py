"""`ad doctor` finds what is wrong with an installation and prints the line that mends it."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import importlib_metadata
import pytest
import typer
from typer.testing import CliRunner

from ad_core.api import PluginInfo, Seam, hookimpl
from ad_core.cli import doctor as rooms
from ad_core.native import CannotCompile
from ad_core.registry import Registry


class Place(Seam):
    name, produces = "toy.seam", "ad_toy::mix"

    def __init__(self, versions):
        self.transformers = versions

    def applies(self, module):
        return None

    def open(self, module, entered):
        raise NotImplementedError


def plugin(name, **returned):
    module = ModuleType(f"ad_{name}")
    module.INFO = PluginInfo(name=name, api=(1, 0))
    for hook, value in returned.items():
        module.__dict__[hook] = hookimpl(_returning(hook, value))
    return module


def _returning(name, value):
    def hook():
        if isinstance(value, Exception):
            raise value
        return value

    hook.__name__ = name
    return hook


@pytest.fixture
def run(monkeypatch):
    """Runs `ad doctor` on these plugins."""

    def run(*modules, words=()):
        monkeypatch.setattr(rooms, "quiet_registry", lambda: Registry.isolated(*modules, strict=False))
        app = typer.Typer()
        app.command()(rooms.doctor)
        return CliRunner().invoke(app, list(words))

    return run


def test_a_sound_installation_has_no_error(run):
    done = run(plugin("toy", ad_passes=[]))
    assert done.exit_code == 0, done.output
    assert f"at {sys.executable}" in done.output
    assert importlib_metadata.version("torch") in done.output
    assert importlib_metadata.version("transformers") in done.output
    assert "every hook answers" in done.output
    assert "error" not in done.output


def test_a_hook_that_raises_is_found_though_nothing_asked_for_it(run):
    done = run(plugin("toy", ad_loaders=RuntimeError("boom")))
    assert done.exit_code == 1
    assert "broken: its hook ad_loaders() raised RuntimeError: boom" in done.output
    assert f"-> {sys.executable} -m pip install -U ad-toy" in done.output
    assert "Traceback" not in done.output


def test_one_plugin_by_name_comes_with_its_traceback(run):
    done = run(plugin("toy", ad_loaders=RuntimeError("boom")), plugin("fine"), words=["toy"])
    assert done.exit_code == 1
    assert "Traceback" in done.output
    assert "fine" not in done.output
    assert run(plugin("fine"), words=["fine"]).exit_code == 0
    assert "nothing installed has this name" in run(plugin("fine"), words=["other"]).output


def test_json_holds_every_finding(run):
    findings = json.loads(run(plugin("toy", ad_loaders=RuntimeError("boom")), words=["--json"]).output)
    (found,) = [finding for finding in findings if finding["subject"] == "toy ad-toy"]
    assert found["level"] == "error"
    assert "RuntimeError: boom" in found["detail"]


def test_a_seam_whose_versions_have_passed_is_reported(run):
    done = run(plugin("toy", ad_matchers=[Place(">=4,<5")]))
    assert done.exit_code == 0
    assert "the seam toy.seam is for transformers >=4,<5" in done.output
    assert "is not used" in done.output
    assert "toy.seam" not in run(plugin("toy", ad_matchers=[Place(">=4")])).output
    assert run(plugin("toy", ad_matchers=[Place("sometimes")])).exit_code == 1


def test_no_plugin_at_all_is_worth_a_note(run):
    done = run()
    assert done.exit_code == 0
    assert "pip install -U ad-attention" in done.output


class Installed(importlib_metadata.Distribution):
    """An editable install of a project named toy."""

    def __init__(self, files):
        self.files_by_name = files

    def read_text(self, filename):
        return self.files_by_name.get(filename)

    def locate_file(self, path):
        return path


@pytest.mark.parametrize(
    ("project", "what"),
    [
        ('version = "1.0"\n[project.entry-points.g]\na = "toy.plugin"', None),
        ('version = "1.1"\n[project.entry-points.g]\na = "toy.plugin"', "its source is version 1.1, installed is 1.0"),
        ('version = "1.0"\n[project.entry-points.g]\na = "toy.other"', "its entry points in g have changed"),
        ('version = "1.0"\n[project.entry-points.g]\na = "toy.plugin"\nb = "toy.plugin"', "its entry points in g have changed"),
        (None, "is gone or unreadable"),
    ],
)
def test_an_editable_install_that_is_out_of_date_is_found(run, monkeypatch, tmp_path, project, what):
    if project is not None:
        (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "toy"\n{project}\n')
    installed = Installed({"METADATA": "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n", "entry_points.txt": "[g]\na = toy.plugin\n"})
    monkeypatch.setattr(rooms, "installed_as_source", lambda: [(installed, tmp_path)])
    done = run(plugin("toy"))
    assert done.exit_code == (1 if what else 0), done.output
    assert what is None or what in done.output


def test_it_says_what_compiles_kernels_and_that_they_decline_without(monkeypatch):
    monkeypatch.setattr(rooms, "find_compiler", lambda: "/usr/bin/cc")
    assert rooms._compiler() == rooms.Finding("ok", "native", "/usr/bin/cc compiles kernels for this CPU")

    def missing():
        raise CannotCompile("there is no C compiler")

    monkeypatch.setattr(rooms, "find_compiler", missing)
    assert rooms._compiler().level == "note"
