"""What plugins offer, whose each object is, and that a name means one object."""

from __future__ import annotations

import pickle
import subprocess
import sys
from types import MappingProxyType

import pytest
import torch

from ad_core.api import CanonicalOp, Declined, Kernel, Matcher, Mixer, Pass, Role, Seam, Stage
from ad_core.api.errors import PluginConflictError, PluginError
from ad_core.graph.ops import define_op
from ad_core.registry import Registry, State, isolated

MIX = define_op(
    "ad_toyreg::mix(Tensor x, Tensor weight, float scale=1.0) -> Tensor", lambda x, weight, scale=1.0: x.clone(), torch.empty_like
)
ROW = define_op("ad_toyreg::row(Tensor x) -> Tensor", lambda x: x.clone(), torch.empty_like)


class Ref(Kernel):
    name, target, op = "toy.ref", "ad_toyreg::mix", "ad_toyreg::mix_ref"


class Foreign(Kernel):
    name, target, op = "guest.fast", "ad_toyreg::mix", "ad_guest::mix_fast"


class Finder(Matcher):
    name, produces = "toy.finder", "ad_toyreg::mix"

    def find(self, graph):
        return [Declined("nothing")]


class Place(Seam):
    name, produces = "toy.seam", "ad_toyreg::mix"

    def applies(self, module):
        return None

    def open(self, module, entered):
        raise NotImplementedError


class Mix(Mixer):
    name, op = "toy.mix", MIX
    roles = MappingProxyType({"x": Role.TOKEN, "weight": Role.PARAM, "scale": Role.CONST})

    def __init__(self, matchers=(), kernels=()):
        self.matchers, self.kernels = matchers, kernels

    def resources(self, call, options):
        return {}


class Row(CanonicalOp):
    name, op, roles = "toy.row", ROW, MappingProxyType({"x": Role.TOKEN})


class Tidy(Pass):
    name, stage = "shared.tidy", Stage.CLEAN

    def run(self, graph, context):
        raise NotImplementedError


def toy(plugin, **hooks):
    return plugin("toy", namespaces=["ad_toyreg"], **hooks)


def test_every_object_knows_where_it_comes_from(plugin):
    finder, seam, extra = Finder(), Place(), Finder()
    extra.name = "guest.finder"
    owner = toy(plugin, ad_mixers=[Mix([finder, seam], [Ref()])], ad_ops=[Row()])
    guest = plugin("guest", namespaces=["ad_guest"], ad_kernels=[Foreign()], ad_matchers=[extra])
    registry = isolated(owner, guest)
    assert [(offer.item.name, offer.plugin, offer.distribution) for offer in registry.mixers()] == [("toy.mix", "toy", "ad-toy-module")]
    assert [offer.item.name for offer in registry.ops()] == ["toy.row"]
    assert [(o.item.name, o.plugin) for o in registry.kernels_for("ad_toyreg::mix")] == [("guest.fast", "guest"), ("toy.ref", "toy")]
    assert registry.kernels_for("ad_toyreg::row") == ()
    assert [(offer.item, offer.plugin) for offer in registry.matchers()] == [(extra, "guest"), (finder, "toy")]
    assert [offer.item for offer in registry.seams()] == [seam]
    assert registry.owner("ad_toyreg::mix").name == "toy"
    assert registry.owner("ad_nobody::mix") is None
    assert registry.canonical("ad_toyreg::row").item.name == "toy.row"


def test_a_part_that_two_mixers_list_counts_once(plugin):
    seam = Place()
    row = Row()
    row.matchers = [seam]
    assert len(isolated(toy(plugin, ad_mixers=[Mix([seam])], ad_ops=[row])).seams()) == 1


def test_parts_of_a_plugin_that_fails_while_they_are_collected_are_left_out(plugin):
    registry = Registry.isolated(toy(plugin, ad_mixers=[Mix(kernels=[Ref()])], ad_kernels=None), strict=False)
    assert registry.kernels_for("ad_toyreg::mix") == ()
    assert registry.mixers() == ()


class BadRoles(Mix):
    name, roles = "toy.bad", MappingProxyType({"x": Role.TOKEN})


class BadRole(Mix):
    name, roles = "toy.bad", MappingProxyType({"x": "token", "weight": "param", "scale": "const"})


class BadOp(Mix):
    name, op = "toy.bad", torch.ops.aten.relu


class Elsewhere(Mix):
    name, op, roles = "toy.bad", torch.ops.aten.relu.default, MappingProxyType({"self": Role.TOKEN})


class WrongTarget(Ref):
    target = "ad_toyreg::row"


class NoTarget(Ref):
    target = "mix"


class BadRequirement(Ref):
    requires = ("not a requirement",)


class BadGraph(Ref):
    graph = "sometimes"


class ForeignOp(Ref):
    op = "aten::relu"


class Vague(Finder):
    produces = "mix"


@pytest.mark.parametrize(
    ("mixer", "reason"),
    [
        (BadRoles(), "must give a Role to every argument of ad_toyreg::mix; at odds: scale, weight"),
        (BadRole(), "values are no Role"),
        (BadOp(), "was not made by ad_core.graph.define_op"),
        (Elsewhere(), "brings the op aten::relu, outside of the plugin's op_namespaces"),
        (Mix(kernels=[WrongTarget()]), "which serves ad_toyreg::row"),
        (Mix(kernels=[NoTarget()]), "has no target of the form"),
        (Mix(kernels=[BadRequirement()]), "'not a requirement', which is not a PEP 508 requirement"),
        (Mix(kernels=[BadGraph()]), "graph='sometimes'"),
        (Mix(kernels=[ForeignOp()]), "calls the cached op aten::relu, outside"),
        (Mix(kernels=[Ref]), "lists the class Ref where an instance of Kernel belongs"),
        (Mix(kernels=[Ref(), Ref()]), "two different parts named 'toy.ref'"),
        (Mix(matchers=[Ref()]), "lists a Ref where an instance of Matcher or Seam belongs"),
        (Mix(matchers=[Vague()]), "does not say which canonical op it produces"),
    ],
)
def test_a_mixer_that_breaks_the_contract_is_named(plugin, mixer, reason):
    registry = Registry.isolated(toy(plugin, ad_mixers=[mixer]), strict=False)
    assert registry.mixers() == ()
    assert reason in registry.find("toy").reason


def test_a_mixer_is_not_an_op_without_memory(plugin):
    registry = Registry.isolated(toy(plugin, ad_ops=[Mix()]), strict=False)
    registry.ops()
    assert "return it from ad_mixers()" in registry.find("toy").reason


def test_one_object_name_from_two_plugins_refuses_both(plugin):
    registry = Registry.isolated(plugin("one", ad_passes=[Tidy()]), plugin("two", ad_passes=[Tidy()]), plugin("three"), strict=False)
    assert registry.passes() == ()
    assert [str(record.state) for record in registry.plugins] == ["conflict", "loaded", "conflict"]
    assert "the name 'shared.tidy' is claimed by ad-one-module and ad-two-module" in registry.find("one").reason
    with pytest.raises(PluginConflictError):
        isolated(plugin("one", ad_passes=[Tidy()]), plugin("two", ad_passes=[Tidy()])).passes()


def test_one_object_name_twice_in_a_plugin_breaks_it(plugin):
    registry = Registry.isolated(plugin("one", ad_passes=[Tidy(), Tidy()]), strict=False)
    assert registry.passes() == ()
    assert registry.find("one").state is State.BROKEN
    assert "two different objects named 'shared.tidy'" in registry.find("one").reason


def test_an_isolated_registry_sees_nothing_installed(install, plugin, monkeypatch):
    install("toy")
    monkeypatch.setenv("AD_PLUGINS", "")
    assert [record.name for record in isolated(plugin("mine")).plugins] == ["mine"]


def test_a_spec_is_plain_and_makes_the_same_registry(install):
    install("toy")
    spec = pickle.loads(pickle.dumps(Registry.load(allow=["toy"]).to_spec()))
    again = Registry.from_spec(spec)
    assert [record.name for record in again.plugins if record.state is State.LOADED] == ["toy"]
    assert again.to_spec() == spec


def test_a_spec_is_refused_where_other_versions_are_installed(install, site):
    install("toy")
    spec = Registry.load(allow=["toy"]).to_spec()
    (site / "ad_toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: ad-toy\nVersion: 1.1\n")
    with pytest.raises(PluginError, match="two processes see different plugins") as caught:
        Registry.from_spec(spec)
    assert "1.0" in caught.value.why
    assert "1.1" in caught.value.why


def test_a_spec_is_refused_where_a_plugin_lives_in_this_process_alone(plugin):
    with pytest.raises(PluginError, match="lives in this process alone"):
        isolated(plugin("toy")).to_spec()


def test_importing_and_loading_the_registry_imports_no_torch():
    code = (
        "import sys\n"
        "from ad_core.registry import Registry\nfrom ad_core.registry.index import install_hint\nimport ad_core.registry.arbitrate\n"
        "registry = Registry.load()\ninstall_hint(registry, model_type='anything')\n"
        "bad = {'torch', 'transformers', 'triton', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
