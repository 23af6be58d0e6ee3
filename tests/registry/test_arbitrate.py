"""Capability, then the user, then the owner by priority, then whom the user prefers. A tie between strangers is an error."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

from ad_core.api import CanonicalOp, Declined, Environment, Kernel, Mixer, OpCall, Role
from ad_core.api.errors import AmbiguousKernelError, ConfigError, NoKernelError
from ad_core.graph.ops import define_op
from ad_core.registry import isolated
from ad_core.registry.arbitrate import check_choices, choose_kernel

OP = "ad_contest::mix"
MIX = define_op("ad_contest::mix(Tensor weight, Tensor ids, Tensor x) -> Tensor", lambda weight, ids, x: x.clone(), lambda w, i, x: x)
ROW = define_op("ad_contest::row(Tensor x) -> Tensor", lambda x: x.clone(), torch.empty_like)


class Mix(Mixer):
    name, op = "contest.mix", MIX
    roles = MappingProxyType({"weight": Role.PARAM, "ids": Role.TOKEN, "x": Role.TOKEN})

    def __init__(self, kernels):
        self.kernels = kernels

    def resources(self, call, options):
        return {}


class Row(CanonicalOp):
    name, op, roles = "contest.row", ROW, MappingProxyType({"x": Role.TOKEN})


def kernel(name, priority=0, *, namespace="ad_contest", target=OP, answer=None, **attributes):
    class Made(Kernel):
        def supports(self, call, environment):
            if isinstance(answer, Exception):
                raise answer
            return answer

    made = Made()
    made.name, made.priority, made.target, made.op = name, priority, target, f"{namespace}::cached"
    for attribute, value in attributes.items():
        setattr(made, attribute, value)
    return made


@pytest.fixture
def contest(plugin):
    """contest(own=[...], guest=[...], other=[...], **choices) runs one arbitration; guest and other are foreign plugins."""

    def contest(own=(), guest=(), other=(), *, device="cpu", dtype=torch.float32, **choices):
        modules = [plugin("contest", namespaces=["ad_contest"], ad_mixers=[Mix(own)], ad_ops=[Row()])]
        modules += [plugin(name, namespaces=[f"ad_{name}"], ad_kernels=kernels) for name, kernels in (("guest", guest), ("other", other))]
        registry = isolated(*modules)
        ids, x = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 3, dtype=dtype)
        call = OpCall("mix_1", "layers.0.mixer", OP, {"weight": torch.zeros(3, dtype=torch.float64), "ids": ids, "x": x})
        offer, decision = choose_kernel(call, registry, Environment(device), **choices)
        return offer.item.name, decision

    return contest


def guest_kernel(name, priority=0, plugin="guest", **attributes):
    return kernel(name, priority, namespace=f"ad_{plugin}", **attributes)


def test_the_owners_highest_priority_wins_and_the_plan_says_why(contest):
    winner, decision = contest([kernel("ref"), kernel("fast", 100)])
    assert winner == "fast"
    assert (decision.subject, decision.winner, decision.rule) == (OP, "fast", "owner, by priority")
    assert decision.losers == {"ref": "its priority is not above 100"}
    assert decision.members == ("mix_1",)


def test_equal_priorities_of_one_distribution_go_by_name(contest):
    assert contest([kernel("b", 5), kernel("a", 5)])[0] == "a"


@pytest.mark.parametrize(
    ("unable", "reason"),
    [
        (kernel("best", 200, devices=frozenset({"cuda"})), "it runs on cuda, not on cpu"),
        (kernel("best", 200, dtypes=frozenset({"bfloat16"})), "it computes bfloat16, not float32"),
        (kernel("best", 200, requires=("no-such-lib>=1",)), "no-such-lib is not installed"),
        (kernel("best", 200, requires=("pluggy>=99",)), "pluggy>=99 is required, found"),
        (kernel("best", 200, answer=Declined("head size 80")), "head size 80"),
        (kernel("best", 200, answer=ValueError("oops")), "its supports() raised ValueError: oops"),
        (kernel("best", 200, answer=False), "its supports() returned False instead of None or Declined"),
    ],
)
def test_what_cannot_run_here_drops_out_with_its_reason(contest, unable, reason):
    winner, decision = contest([kernel("ref"), unable])
    assert winner == "ref"
    assert reason in decision.losers["best"]


def test_the_dtype_of_a_call_is_that_of_its_first_floating_token_argument(contest):
    assert contest([kernel("half", dtypes=frozenset({"bfloat16"}))], dtype=torch.bfloat16)[0] == "half"


def test_installing_a_foreign_kernel_changes_nothing(contest):
    winner, decision = contest([kernel("ref")], [guest_kernel("guest.fast", 1000)])
    assert winner == "ref"
    assert "prefer = ['ad-guest-module'] admits it" in decision.losers["guest.fast"]


@pytest.mark.parametrize("word", ["guest", "ad-guest-module", "ad_guest.module", "guest.fast"])
def test_a_preferred_foreign_kernel_competes_by_priority(contest, word):
    winner, decision = contest([kernel("ref")], [guest_kernel("guest.fast", 100)], prefer=[word])
    assert (winner, decision.rule) == ("guest.fast", "prefer, by priority")
    assert contest([kernel("ref", 200)], [guest_kernel("guest.fast", 100)], prefer=[word])[0] == "ref"


def test_a_preferred_foreign_kernel_that_declines_leaves_the_owners(contest):
    assert contest([kernel("ref")], [guest_kernel("guest.fast", 100, answer=Declined("no"))], prefer=["guest"])[0] == "ref"


def test_the_users_choice_beats_priority_and_ownership(contest):
    winner, decision = contest([kernel("ref"), kernel("fast", 100)], [guest_kernel("guest.slow", -1)], kernels={OP: "guest.slow"})
    assert (winner, decision.rule) == ("guest.slow", "config")
    assert set(decision.losers) == {"ref", "fast"}


def test_a_configured_kernel_that_declines_is_an_error_and_no_fallback(contest):
    with pytest.raises(ConfigError, match="'fast' cannot run") as caught:
        contest([kernel("ref"), kernel("fast", 100, answer=Declined("head size 80"))], kernels={OP: "fast"})
    assert caught.value.why == "head size 80"
    assert "ref" in caught.value.hint


def test_a_configured_kernel_that_is_not_there_names_the_nearest(contest):
    with pytest.raises(ConfigError, match="no kernel 'fats'") as caught:
        contest([kernel("ref"), kernel("fast")], kernels={OP: "fats"})
    assert "'fast'" in caught.value.hint


def test_a_tie_between_distributions_prints_the_line_to_paste(contest):
    with pytest.raises(AmbiguousKernelError) as caught:
        contest([kernel("ref", 100)], [guest_kernel("guest.fast", 100)], prefer=["guest"])
    assert 'kernels = {"ad_contest::mix" = "guest.fast"}   # ad-guest-module' in caught.value.hint
    assert 'kernels = {"ad_contest::mix" = "ref"}   # ad-contest-module' in caught.value.hint
    guests = {"guest": [guest_kernel("guest.a")], "other": [guest_kernel("other.a", plugin="other")]}
    with pytest.raises(AmbiguousKernelError, match="ad-guest-module and ad-other-module tie"):
        contest([kernel("ref", answer=Declined("no"))], **guests, prefer=["guest", "other"])


def test_with_nothing_left_every_candidate_is_listed(contest):
    with pytest.raises(NoKernelError) as caught:
        contest([kernel("ref", answer=Declined("too wide"))], [guest_kernel("guest.fast")])
    assert caught.value.where == "layers.0.mixer"
    assert "ref: too wide" in caught.value.why
    assert "guest.fast: it does not come from the op's owner" in caught.value.why


def test_an_op_without_memory_that_no_kernel_serves_computes_itself(plugin):
    declining = kernel("row.fast", target="ad_contest::row", answer=Declined("too short"))
    row = Row()
    row.kernels = [declining]
    registry = isolated(plugin("contest", namespaces=["ad_contest"], ad_ops=[row]))
    call = OpCall("row_1", "layers.0", "ad_contest::row", {"x": torch.zeros(1, 2, 3)})
    offer, decision = choose_kernel(call, registry, Environment("cpu"), members=("row_1", "row_2"))
    assert offer is None
    assert decision.losers == {"row.fast": "too short"}
    assert decision.members == ("row_1", "row_2")


@pytest.mark.parametrize(
    ("kernels", "prefer", "message", "hint"),
    [
        ({"ad_contest::mxi": "ref"}, [], "no loaded plugin owns the op 'ad_contest::mxi'", "'ad_contest::mix'"),
        ({OP: "rfe"}, [], "there is no kernel 'rfe'", "'ref'"),
        ({}, ["gest"], "nothing installed is called 'gest'", "'guest'"),
    ],
)
def test_choices_that_could_never_matter_are_refused(plugin, kernels, prefer, message, hint):
    owner = plugin("contest", namespaces=["ad_contest"], ad_mixers=[Mix([kernel("ref")])])
    registry = isolated(owner, plugin("guest"))
    check_choices(registry, {OP: "ref"}, ["guest", "ad_guest_module", "ref"])
    with pytest.raises(ConfigError, match=message) as caught:
        check_choices(registry, kernels, prefer)
    assert hint in caught.value.hint
