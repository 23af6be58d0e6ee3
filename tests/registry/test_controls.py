"""Who may be loaded: arguments, environment, and what each means for the other."""

from __future__ import annotations

import sys

import pytest

from ad_core.api.errors import PluginError
from ad_core.registry import Registry, State


def loaded(registry):
    return {record.name for record in registry.plugins if record.state is State.LOADED}


@pytest.fixture
def modules(install):
    return {name: install(name) for name in ("one", "two")}


@pytest.mark.parametrize("word", ["one", "ad-one", "AD_One"])
def test_allow_takes_plugin_or_distribution_names(modules, word):
    registry = Registry.load(allow=[word])
    assert loaded(registry) == {"one"}
    assert modules["two"] not in sys.modules
    blocked = registry.find("two")
    assert blocked.state is State.BLOCKED
    assert "not among the allowed" in blocked.reason


def test_the_environment_allows(modules, monkeypatch):
    monkeypatch.setenv("AD_PLUGINS", "one, ad-two")
    assert loaded(Registry.load()) == {"one", "two"}


def test_an_empty_allow_list_means_none(modules, monkeypatch):
    monkeypatch.setenv("AD_PLUGINS", "")
    assert loaded(Registry.load()) == set()
    assert not set(modules.values()) & set(sys.modules)


def test_arguments_can_only_narrow_what_the_environment_allows(modules, monkeypatch):
    monkeypatch.setenv("AD_PLUGINS", "one")
    assert loaded(Registry.load(allow=["one", "two"])) == {"one"}


def test_a_denied_plugin_is_never_imported_even_if_allowed(modules, monkeypatch):
    monkeypatch.setenv("AD_DISABLE_PLUGINS", "ad-one")
    assert loaded(Registry.load(allow=["one", "two"], deny=["nobody"])) == {"two"}
    assert modules["one"] not in sys.modules
    assert loaded(Registry.load(allow=["one", "two"], deny=["two"])) == set()


def test_blocking_is_no_failure_even_when_strict(modules):
    assert loaded(Registry.load(allow=["one"], strict=True)) == {"one"}


def test_allowing_what_is_not_installed_is_an_error(modules):
    with pytest.raises(PluginError, match="not installed: oen") as caught:
        Registry.load(allow=["oen"])
    assert "one" in caught.value.why


def test_the_environment_may_name_what_is_not_installed_but_says_so(modules, monkeypatch, caplog):
    monkeypatch.setenv("AD_PLUGINS", "one,oen")
    assert loaded(Registry.load()) == {"one"}
    assert "not installed: oen" in caplog.text
    monkeypatch.setenv("AD_STRICT", "1")
    with pytest.raises(PluginError, match="not installed: oen"):
        Registry.load()


def test_plugins_given_as_objects_need_no_leave_but_can_be_denied(modules, plugin, monkeypatch):
    monkeypatch.setenv("AD_PLUGINS", "")
    assert loaded(Registry.load(extra=[plugin("mine")])) == {"mine"}
    assert loaded(Registry.load(extra=[plugin("mine")], deny=["mine"])) == set()
