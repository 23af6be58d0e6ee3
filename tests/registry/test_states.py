"""One bad plugin costs one line, never the process."""

from __future__ import annotations

import logging
import sys

import pytest

from ad_core.api.errors import PluginBrokenError, PluginConflictError, PluginIncompatibleError
from ad_core.registry import Registry, State

INFO = "from ad_core.api import PluginInfo, hookimpl\n"


def record(registry, name):
    return next(record for record in registry.plugins if record.name == name)


def test_a_good_plugin_is_loaded_with_its_origin(install):
    module = install("toy", version="2.3")
    found = record(Registry.load(), "toy")
    assert (found.state, found.distribution, found.version, found.value) == (State.LOADED, "ad-toy", "2.3", module)
    assert found.hooks == ("ad_passes",)
    assert found.info.api == (1, 0)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import there_is_no_such_module", "ModuleNotFoundError: No module named 'there_is_no_such_module'"),
        ("raise RuntimeError('boom\\nsecond line')", "raised RuntimeError: boom"),
        ("import sys; sys.exit(3)", "raised SystemExit: 3"),
        ("def (", "raised SyntaxError"),
        ("raise BaseException('odd')", "raised BaseException: odd"),
        ("x = 1", "it has no INFO"),
        ("INFO = {'name': 'toy'}", "its INFO is a dict"),
        (INFO + "INFO = PluginInfo(name='other', api=(1, 0))", "named 'toy' but its INFO.name is 'other'"),
        (INFO + "INFO = PluginInfo(name='toy', api='1.0')", "INFO.api must be (major, minor)"),
        (INFO + "INFO = PluginInfo(name='toy', api=(1, 0), op_namespaces='ad_toy')", "INFO.op_namespaces must be a tuple"),
        (INFO + "INFO = PluginInfo(name='toy', api=(1, 0), op_namespaces=('aten',))", "'aten', which is reserved"),
        (INFO + "INFO = PluginInfo(name='toy', api=(1, 0), config=dict)", "INFO.config must be a pydantic model"),
        (
            INFO + "import pydantic\nclass C(pydantic.BaseModel): pass\nINFO = PluginInfo(name='toy', api=(1, 0), config=C)",
            "must set extra='forbid'",
        ),
    ],
)
def test_a_plugin_that_cannot_be_imported_or_breaks_the_contract_is_broken(install, source, reason):
    install("toy", source)
    install("good")
    registry = Registry.load()
    found = record(registry, "toy")
    assert found.state is State.BROKEN
    assert reason in found.reason
    assert "\n" not in found.line
    assert record(registry, "good").state is State.LOADED
    with pytest.raises(PluginBrokenError, match="'toy'"):
        Registry.load(strict=True)


def test_keyboard_interrupt_is_not_a_broken_plugin(install):
    install("toy", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        Registry.load()


def test_a_missing_requirement_is_what_the_fix_installs(install):
    install("toy", "import no_such_lib", requires=["no-such-lib>=2"])
    assert record(Registry.load(), "toy").fix == f"{sys.executable} -m pip install -U 'no-such-lib>=2'"


def test_what_a_plugin_prints_does_not_reach_stdout(install, capsys):
    install("toy", INFO + "print('hello')\nINFO = PluginInfo(name='toy', api=(1, 0))")
    Registry.load()
    assert capsys.readouterr().out == ""


def test_every_failure_is_one_line_in_the_log(install, caplog):
    install("toy", "raise RuntimeError('boom')")
    with caplog.at_level(logging.WARNING, logger="ad_core"):
        Registry.load(allow=["toy"])
    (line,) = caplog.messages
    assert line.startswith("ad: plugin 'toy' (ad-toy 1.0) is broken: its import raised RuntimeError: boom; ")


def test_one_name_from_two_distributions_refuses_both_and_imports_neither(install):
    modules = [install("toy", distribution="ad-toy"), install("toy", distribution="zz-toy")]
    registry = Registry.load(allow=["toy"])
    loaded = [found for found in registry.plugins if found.state is not State.BLOCKED]
    assert [(found.state, found.distribution) for found in loaded] == [(State.CONFLICT, "ad-toy"), (State.CONFLICT, "zz-toy")]
    assert all("'toy' is claimed by ad-toy and zz-toy" in found.reason for found in loaded)
    assert not set(modules) & set(sys.modules)
    with pytest.raises(PluginConflictError):
        Registry.load(allow=["toy"], strict=True)


def test_denying_one_of_two_rivals_resolves_the_conflict(install):
    install("toy", distribution="ad-toy")
    install("toy", distribution="zz-toy")
    states = [record.state for record in Registry.load(allow=["toy"], deny=["zz-toy"]).plugins if record.name == "toy"]
    assert states == [State.LOADED, State.BLOCKED]


def test_one_op_namespace_from_two_distributions_refuses_both(install):
    source = INFO + "INFO = PluginInfo(name={0!r}, api=(1, 0), op_namespaces=('ad_shared', 'ad_{0}'))"
    for name in ("one", "two"):
        install(name, source.format(name))
    install("good")
    registry = Registry.load()
    for name in ("one", "two"):
        assert record(registry, name).state is State.CONFLICT
        assert "'ad_shared' is claimed by ad-one and ad-two" in record(registry, name).reason
    assert record(registry, "good").state is State.LOADED


def test_the_same_distribution_twice_on_the_path_counts_once(install, site, tmp_path, monkeypatch):
    install("toy")
    link = tmp_path / "linked"
    link.symlink_to(site, target_is_directory=True)
    monkeypatch.syspath_prepend(link)
    assert [found.state for found in Registry.load(allow=["toy"]).plugins if found.name == "toy"] == [State.LOADED]


def test_plugins_are_sorted_whatever_the_order_of_the_path(install):
    for name in ("zebra", "ape", "lynx"):
        install(name)
    names = [found.name for found in Registry.load().plugins if found.name in {"zebra", "ape", "lynx"}]
    assert names == ["ape", "lynx", "zebra"]


def test_metadata_that_cannot_be_read_breaks_only_its_own_plugin(install, site):
    install("toy")
    install("good")
    (site / "ad_toy-1.0.dist-info" / "METADATA").unlink()
    (site / "ad_toy-1.0.dist-info" / "entry_points.txt").write_text("[ad_core.plugins.v1]\nno equals sign\n")
    registry = Registry.load()
    assert record(registry, "good").state is State.LOADED
    assert record(registry, "ad-toy").state is State.BROKEN
    assert "metadata cannot be read" in record(registry, "ad-toy").reason


def test_strict_raises_the_error_of_the_state(install, monkeypatch):
    install("toy", requires=["ad-core>=99"])
    monkeypatch.setenv("AD_STRICT", "1")
    with pytest.raises(PluginIncompatibleError, match="ad-core>=99"):
        Registry.load()
