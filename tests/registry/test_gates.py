"""A plugin for another core is refused before its import, one for another contract right after it."""

from __future__ import annotations

import sys

import pytest

import ad_core
from ad_core.api import API_VERSION
from ad_core.registry import Registry, State
from ad_core.registry.gates import unmet

MAJOR, MINOR = API_VERSION


def only(registry, name="toy"):
    (found,) = [record for record in registry.plugins if record.name == name]
    return found


@pytest.mark.parametrize("requirement", ["ad-core>=99", "ad-core<0.0.1", "ad_core ==98.*", "AD.Core>=99; python_version >= '3'"])
def test_a_distribution_that_needs_another_core_is_not_imported(install, requirement):
    module = install("toy", requires=["packaging", requirement])
    found = only(Registry.load())
    assert found.state is State.INCOMPATIBLE
    assert f"found {ad_core.__version__}" in found.reason
    assert "pip install -U ad-core ad-toy" in found.fix
    assert module not in sys.modules


@pytest.mark.parametrize(
    "requirement", ["ad-core", "ad-core>=0.1,<99", "ad-core>=99; extra == 'later'", "ad-core>=99; python_version < '3'"]
)
def test_a_requirement_that_holds_or_does_not_apply_lets_it_pass(install, requirement):
    install("toy", requires=[requirement])
    assert only(Registry.load()).state is State.LOADED


def test_a_plugin_for_another_major_of_the_contract_is_not_imported(install):
    module = install("toy", groups=["ad_core.plugins.v2"])
    found = only(Registry.load())
    assert found.state is State.INCOMPATIBLE
    assert found.reason == "it is written for version 2 of the contract, this core speaks version 1"
    assert module not in sys.modules


@pytest.mark.parametrize("groups", [["ad_core.plugins.v2", "ad_core.plugins.v1"], ["ad_core.plugins.v1", "ad_core.plugins.v2"]])
def test_a_plugin_that_serves_several_majors_is_taken_for_ours(install, groups):
    install("toy", groups=groups)
    assert only(Registry.load()).state is State.LOADED


@pytest.mark.parametrize("api", [(MAJOR, MINOR + 1), (MAJOR + 1, 0), (MAJOR - 1, 0)])
def test_info_that_asks_for_another_contract_is_incompatible(install, api):
    install("toy", f"from ad_core.api import PluginInfo\nINFO = PluginInfo(name='toy', api={api!r})")
    found = only(Registry.load())
    assert found.state is State.INCOMPATIBLE
    assert f"needs version {api[0]}.{api[1]}" in found.reason


def test_an_incompatible_namesake_is_no_rival(install):
    install("toy", distribution="ad-toy")
    install("toy", distribution="old-toy", requires=["ad-core<0.0.1"])
    states = {record.distribution: record.state for record in Registry.load().plugins if record.name == "toy"}
    assert states == {"ad-toy": State.LOADED, "old-toy": State.INCOMPATIBLE}


@pytest.mark.parametrize(
    ("requirement", "reason"),
    [
        ("pluggy", ""),
        ("pluggy>=1,<2", ""),
        ("pluggy>=99", "pluggy>=99 is required, found"),
        ("no-such-distribution", "no-such-distribution is not installed"),
        ("no-such-distribution; python_version < '3'", ""),
        ("not a requirement", "cannot be read"),
    ],
)
def test_requirements_are_checked_from_metadata(requirement, reason):
    assert (reason in unmet(requirement)) if reason else unmet(requirement) == ""
