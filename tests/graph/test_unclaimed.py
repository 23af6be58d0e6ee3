"""The error for mixers that nothing claims reads as a user needs it."""

from __future__ import annotations

import torch
from torch.fx import Graph

from ad_core.graph.tokens import MixingNode
from ad_core.graph.unclaimed import RegistryHint, unclaimed_error


def found(module: str, op: str = "aten.cumsum.default", kind: str = "package.modeling.Mixer") -> MixingNode:
    node = Graph().call_function(torch.ops.aten.cumsum.default)
    return MixingNode(node, module, kind, op, "modeling.py:512", "runs along the tokens")


HINT = RegistryHint(
    known=["Known plugin for model_type 'toy':   pip install ad-toy   (not installed)"],
    installed=["attention 0.1.0"],
    broken=["other: it raised"],
    searched="/venv/bin/python, group ad_core.plugins.v1",
)


def test_layers_are_grouped_and_numbers_collapsed() -> None:
    text = str(unclaimed_error([found(f"model.layers.{layer}.mixer") for layer in range(24)], HINT))
    assert text.startswith("24 graph regions mix tokens")
    assert "model.layers.{0,1,2,3,...}.mixer  (package.modeling.Mixer, 24 layers)" in text
    assert "first op: aten.cumsum.default  at modeling.py:512: runs along the tokens" in text


def test_what_would_claim_it_and_what_is_installed_is_said() -> None:
    error = unclaimed_error([found("model.mixer")], HINT)
    text = str(error)
    assert text.startswith("1 graph region mixes tokens")
    for part in (*HINT.known, "Installed: attention 0.1.0", "Broken: other: it raised", f"Searched: {HINT.searched}"):
        assert part in text
    assert "ad-toy" in error.to_dict()["hint"]


def test_without_a_known_plugin_none_is_made_up() -> None:
    text = str(unclaimed_error([found("model.mixer")], RegistryHint()))
    assert "No known plugin claims" in text
    assert "pip install" not in text
    assert "Installed: none.   Broken: none." in text


def test_different_ops_and_a_model_without_modules_have_lines_of_their_own() -> None:
    text = str(unclaimed_error([found(""), found("a.0.b", op="aten.roll.default"), found("a.1.b", op="aten.roll.default")], HINT))
    assert "the model" in text
    assert "a.{0,1}.b" in text
    assert text.count("first op:") == 2
