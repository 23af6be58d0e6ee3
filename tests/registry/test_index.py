"""Only names from the index are suggested, and never one that cannot be had or that is installed already."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ad_core.registry import Registry
from ad_core.registry.index import KnownPlugin, install_hint, known_plugins, providers

ROOT = Path(__file__).parents[2]


def names(text):
    """Everything in the text that looks like a distribution of ours."""
    return set(re.findall(r"\bad-[a-z]+", text))


def test_the_index_is_what_the_generator_writes():
    done = subprocess.run([sys.executable, ROOT / "tools" / "gen_index.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_plugin_of_this_repository_is_available_and_no_other():
    here = {tomllib.loads(path.read_text())["project"]["name"] for path in ROOT.glob("plugins/*/pyproject.toml")}
    assert {plugin.distribution for plugin in known_plugins() if plugin.available} == here


def test_a_model_may_need_several_plugins():
    assert {plugin.name for plugin in providers(model_type="bamba")} == {"attention", "conv", "mamba"}
    assert [plugin.name for plugin in providers(op="ad_attention::attention")] == ["attention"]
    assert [plugin.name for plugin in providers(op="ad_mamba::anything")] == ["mamba"]
    assert [plugin.name for plugin in providers(suffix=".GGUF")] == ["quant"]
    assert providers(model_type="no_such_model") == ()
    assert providers() == ()


def test_what_is_not_installed_and_available_gets_its_pip_line(plugin):
    hint = install_hint(Registry.isolated(), model_type="llama")
    assert f"{sys.executable} -m pip install -U ad-attention" in hint
    assert names(hint) == {"ad-attention"}
    assert install_hint(model_type="llama") == hint


def test_several_plugins_get_a_pip_line_each():
    hint = install_hint(Registry.isolated(), model_type="mamba2")
    assert all(f"{sys.executable} -m pip install -U {name}   " in hint for name in ("ad-conv", "ad-mamba"))
    assert names(hint) == {"ad-conv", "ad-mamba"}


def test_what_is_only_planned_is_never_a_pip_line(monkeypatch):
    planned = KnownPlugin("later", "ad-later", False, "what is to come", op_namespaces=("ad_later",))
    monkeypatch.setattr("ad_core.registry.index.known_plugins", lambda: (planned,))
    hint = install_hint(Registry.isolated(), op="ad_later::op")
    assert "ad-later" in hint
    assert "planned" in hint
    assert "pip install" not in hint


def test_every_type_that_works_is_known_with_all_that_serves_it():
    """The page of what works names the ops; the index must name those who bring them."""
    rows = re.findall(r"^\| ([\w-]+) \| works \| (.*?) \|", (ROOT / "docs" / "support.md").read_text(), re.MULTILINE)
    assert len(rows) > 100
    for model_type, ops in rows:
        namespaces = set(re.findall(r"`(\w+)::", ops))
        assert namespaces <= {name for plugin in providers(model_type=model_type) for name in plugin.op_namespaces}, model_type


def test_what_is_installed_but_not_usable_is_to_be_mended_not_installed(plugin, install):
    broken = Registry.isolated(plugin("attention", ad_mixers=None), strict=False)
    broken.check()
    hint = install_hint(broken, model_type="llama")
    assert "is installed but broken: ad_mixers() returned None" in hint
    assert "pip install" not in hint
    install("other")
    hint = install_hint(Registry.load(allow=["other"]), model_type="llama")
    assert "ad-attention is installed but blocked" in hint


def test_what_is_installed_and_loaded_is_not_to_be_installed_again(plugin):
    hint = install_hint(Registry.isolated(plugin("attention")), model_type="llama")
    assert "is installed and loaded (ad-attention)" in hint
    assert "pip install" not in hint


def test_a_broken_plugin_is_named_where_the_index_knows_nothing(install):
    install("exotic", "raise RuntimeError('boom')")
    hint = install_hint(Registry.load(allow=["exotic"]), model_type="exotic")
    assert "'exotic' (ad-exotic 1.0) is broken: its import raised RuntimeError: boom" in hint


@pytest.mark.parametrize("question", [{"model_type": "retnet"}, {"op": "ad_retnet::mix"}, {"suffix": ".xyz"}, {}])
def test_no_name_is_ever_made_up(question):
    assert names(install_hint(Registry.isolated(), **question)) == set()
