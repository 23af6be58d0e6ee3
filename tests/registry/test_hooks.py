"""What a hook is, and what it may return. A plugin that breaks either rule is broken, by name, and hurts nobody else."""

from __future__ import annotations

import pytest
import typer

from ad_core.api import CompileBackend, Loader, Pass, Stage
from ad_core.api.errors import PluginBrokenError
from ad_core.registry import Registry, State, isolated
from ad_core.registry.hooks import HOOKS

INFO = "from ad_core.api import PluginInfo, hookimpl\nINFO = PluginInfo(name='toy', api=(1, 0))\n"


class Tidy(Pass):
    name = "toy.tidy"
    stage = Stage.CLEAN

    def run(self, graph, context):
        raise NotImplementedError


class Backend(CompileBackend):
    name = "toy.backend"

    def compile(self, graph):
        return graph


class Opener(Loader):
    name = "toy.loader"

    def accepts(self, path):
        return None

    def open(self, path, *, trust_remote_code=False):
        raise NotImplementedError


class Nameless(Tidy):
    name = ""


class Stageless(Tidy):
    stage = "clean"


def test_every_hook_of_the_contract_is_known():
    assert {
        "ad_mixers",
        "ad_ops",
        "ad_kernels",
        "ad_matchers",
        "ad_passes",
        "ad_compilers",
        "ad_loaders",
        "ad_drafters",
        "ad_commands",
    } == set(HOOKS)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("@hookimpl\ndef ad_mixer(): return []", "unknown hook 'ad_mixer'; did you mean 'ad_mixers'?"),
        ("def ad_kernel(): return []", "unknown hook 'ad_kernel'; did you mean 'ad_kernels'?"),
        ("@hookimpl\ndef provide_things(): return []", "unknown hook 'provide_things'; known are ad_mixers"),
        ("@hookimpl(specname='ad_pases')\ndef mine(): return []", "unknown hook 'ad_pases'; did you mean 'ad_passes'?"),
        ("def ad_passes(): return []", "'ad_passes' is not marked with @hookimpl"),
        ("@hookimpl\ndef ad_passes(graph): return []", "'ad_passes'"),
        ("@hookimpl(wrapper=True)\ndef ad_passes(): return (yield)", "'ad_passes' is a wrapper"),
    ],
)
def test_an_unknown_or_malformed_hook_breaks_the_plugin_at_load(install, source, reason):
    install("toy", INFO + source)
    found = Registry.load().find("toy")
    assert found.state is State.BROKEN
    assert reason in found.reason


def test_a_hook_may_have_another_name_in_the_module(install):
    install("toy", INFO + "@hookimpl(specname='ad_passes')\ndef mine(): return []")
    assert Registry.load().find("toy").hooks == ("ad_passes",)


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (None, "ad_passes() returned None, not a list"),
        (Tidy(), "ad_passes() returned a Tidy, not a list"),
        ("ab", "ad_passes() returned a str, not a list"),
        ([Tidy], "item 0 of ad_passes() is the class Tidy; return an instance"),
        ([Tidy(), Backend()], "item 1 of ad_passes() is a Backend, not a Pass"),
        ([Nameless()], "(Nameless) has no name"),
        ([Stageless()], "(toy.tidy) has no stage"),
    ],
)
def test_a_hook_that_returns_the_wrong_thing_breaks_its_plugin(plugin, returned, reason):
    registry = Registry.isolated(plugin("toy", ad_passes=returned, ad_loaders=[Opener()]), strict=False)
    assert registry.find("toy").state is State.LOADED
    assert registry.passes() == ()
    assert registry.find("toy").state is State.BROKEN
    assert reason in registry.find("toy").reason
    assert registry.loaders() == ()


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(2)])
def test_a_hook_that_raises_breaks_only_its_plugin(plugin, error):
    def raising():
        raise error

    registry = Registry.isolated(plugin("bad", ad_passes=raising), plugin("good", ad_passes=[Tidy()]), strict=False)
    assert [offer.plugin for offer in registry.passes()] == ["good"]
    assert registry.find("bad").state is State.BROKEN
    assert f"its hook ad_passes() raised {type(error).__name__}: {error}" in registry.find("bad").reason
    assert type(error).__name__ in registry.find("bad").traceback


def test_offers_already_given_are_withdrawn_when_a_later_hook_fails(plugin):
    registry = Registry.isolated(plugin("toy", ad_passes=[Tidy()], ad_loaders=None), strict=False)
    assert len(registry.passes()) == 1
    assert registry.loaders() == ()
    assert registry.passes() == ()


def test_strict_raises_what_a_hook_did(plugin):
    def raising():
        raise RuntimeError("boom")

    registry = isolated(plugin("bad", ad_passes=raising))
    with pytest.raises(PluginBrokenError, match="boom") as caught:
        registry.passes()
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_hooks_run_at_first_use_and_once(plugin):
    calls = []

    def passes():
        calls.append("passes")
        return [Tidy()]

    registry = isolated(plugin("toy", ad_passes=passes, ad_loaders=lambda: calls.append("loaders") or [Opener()]))
    assert calls == []
    first, second = registry.passes(), registry.passes()
    assert calls == ["passes"]
    assert first[0].item is second[0].item


def test_check_calls_every_hook(plugin):
    calls = []
    hooks = {hook: lambda hook=hook: calls.append(hook) or [] for hook in HOOKS}
    records = isolated(plugin("toy", **hooks)).check()
    assert sorted(calls) == sorted(HOOKS)
    assert [record.state for record in records] == [State.LOADED]


def test_commands_must_be_named(plugin):
    registry = Registry.isolated(plugin("toy", ad_commands=[typer.Typer()]), strict=False)
    assert registry.commands() == ()
    assert "has no name" in registry.find("toy").reason
    assert len(isolated(plugin("toy", ad_commands=[typer.Typer(name="hello")])).commands()) == 1
