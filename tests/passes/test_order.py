"""The order of passes is what they declare, the same for every order of installation, and contradictions name who said what."""

from __future__ import annotations

import itertools
import random

import pytest

from ad_core.api import Pass, PassReport, Stage
from ad_core.api.errors import PassOrderError, PluginConflictError
from ad_core.passes.order import PassOffer, ordered


def offer(name: str, stage: Stage = Stage.FUSE, distribution: str | None = None, **declared: tuple[str, ...]) -> PassOffer:
    kind = type("Toy", (Pass,), {"name": name, "stage": stage, **declared, "run": lambda self, graph, context: PassReport()})
    return PassOffer(kind(), distribution or f"ad-{name.split('.')[0]}")


def names(*offers: PassOffer) -> list[str]:
    return [each.name for each in ordered(offers)]


def test_stages_come_first_and_names_break_ties() -> None:
    assert names(offer("b", Stage.CLEAN), offer("a", Stage.FUSE), offer("c", Stage.CLEAN)) == ["b", "c", "a"]


def test_before_after_and_requires_order_a_stage() -> None:
    assert names(offer("a", after=("b",)), offer("b"), offer("c", before=("b",)), offer("d", requires=("a",))) == ["c", "b", "a", "d"]


def test_a_pass_that_is_not_installed_is_ignored_in_before_and_after() -> None:
    assert names(offer("b", after=("nowhere",)), offer("a", before=("nowhere", "b"))) == ["a", "b"]


def test_the_order_does_not_depend_on_the_order_of_discovery() -> None:
    offers = [
        *(offer(f"p{index}", after=(f"p{index + 3}",) if index < 7 else ()) for index in range(10)),
        offer("x", before=("p4",), after=("p9",)),
        offer("y", Stage.CLEAN),
    ]
    shuffler = random.Random(0)
    orders = set()
    for _ in range(50):
        shuffler.shuffle(offers)
        orders.add(tuple(names(*offers)))
    assert len(orders) == 1


def test_what_was_declared_holds_in_random_graphs() -> None:
    shuffler = random.Random(1)
    for _ in range(30):
        ranks = list(range(8))
        shuffler.shuffle(ranks)
        pairs = [pair for pair in itertools.permutations(range(8), 2) if ranks[pair[0]] < ranks[pair[1]] and shuffler.random() < 0.3]
        offers = [offer(f"p{index}", before=tuple(f"p{second}" for first, second in pairs if first == index)) for index in range(8)]
        result = names(*offers)
        assert all(result.index(f"p{first}") < result.index(f"p{second}") for first, second in pairs)


def test_a_cycle_names_passes_distributions_and_who_said_what() -> None:
    with pytest.raises(PassOrderError) as caught:
        ordered([offer("a.f", before=("b.f",)), offer("b.f", before=("c.f",)), offer("c.f", before=("a.f",)), offer("d.f", after=("a.f",))])
    assert caught.value.what.splitlines() == [
        "cycle among the passes of stage FUSE:",
        "    a.f -> b.f   (a.f [ad-a] says before=b.f)",
        "    b.f -> c.f   (b.f [ad-b] says before=c.f)",
        "    c.f -> a.f   (c.f [ad-c] says before=a.f)",
    ]
    assert "deny_plugins" in str(caught.value)


def test_a_cycle_of_different_words_names_each() -> None:
    with pytest.raises(PassOrderError) as caught:
        ordered([offer("a", after=("b",)), offer("b", requires=("a",))])
    assert "b -> a   (a [ad-a] says after=b)" in str(caught.value)
    assert "a -> b   (b [ad-b] says requires=a)" in str(caught.value)


@pytest.mark.parametrize(
    ("declared", "word"), [({"before": ("early",)}, "before"), ({"after": ("late",)}, "after"), ({"requires": ("late",)}, "requires")]
)
def test_a_contradiction_with_the_stages_names_both(declared: dict[str, tuple[str, ...]], word: str) -> None:
    others = [offer("early", Stage.CLEAN, "ad-early"), offer("late", Stage.CACHE, "ad-late")]
    with pytest.raises(PassOrderError) as caught:
        ordered([*others, offer("mine", Stage.FUSE, "ad-mine", **declared)])
    text, other = str(caught.value), declared[word][0]
    assert f"mine [ad-mine] says {word}={other}" in text
    assert "stage FUSE" in text
    assert f"{other} [ad-{other}] of stage {'CLEAN' if other == 'early' else 'CACHE'}" in text


def test_order_across_stages_that_agrees_with_them_is_fine() -> None:
    assert names(offer("late", Stage.CACHE, after=("early",)), offer("early", Stage.CLEAN, before=("late",))) == ["early", "late"]


def test_a_required_pass_that_is_missing_is_an_error() -> None:
    with pytest.raises(PassOrderError, match=r"mine \[ad-mine\] requires the pass other"):
        ordered([offer("mine", requires=("other",))])


def test_passes_that_exclude_each_other_are_an_error() -> None:
    with pytest.raises(PassOrderError) as caught:
        ordered([offer("a", conflicts=("b",)), offer("b", Stage.CACHE)])
    assert "a [ad-a] and b [ad-b] exclude each other" in str(caught.value)
    assert "a says conflicts=b" in str(caught.value)


def test_duplicate_names_are_an_error_naming_both_distributions() -> None:
    with pytest.raises(PluginConflictError) as caught:
        ordered([offer("same", distribution="ad-one"), offer("same", distribution="ad-two")])
    assert "'same'" in str(caught.value)
    assert "ad-one and ad-two" in str(caught.value)
