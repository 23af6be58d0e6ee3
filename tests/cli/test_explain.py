"""What `ad explain` makes of a plan: like claims together, names whole at any width, a page that says the same."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from ad_core.cli.explain import print_plan
from ad_core.cli.facts import cache_bytes
from ad_core.cli.kinds import kinds, layers, places
from ad_core.cli.picture import picture
from ad_core.plan import Attempt, Claim, Decision, PassEntry, Plan, ResourceEntry


@pytest.fixture
def plan():
    """Six layers: five recurrent, each with a convolution, and at 2 and 5 attention, of which the second reads the first's memory."""
    model = {"name": "toy<3>", "architecture": "Toy", "parameters": 5e6, "dtype": "float32", "weight_bytes": 20 << 20, "max_model_len": 64}
    made = Plan(model=model, attempts=[Attempt("seams", False, "a <reason>"), Attempt("as written", True, "numbers verified")])
    for index in range(6):
        if index in (2, 5):
            made.claims.append(Claim(f"attend_{index}", f"model.layers.{index}.attention", "toy.Attend", "toy::attend", "matcher toy.sdpa"))
        else:
            made.claims.append(Claim(f"conv_{index}", f"model.layers.{index}.scan.conv", "toy.Conv", "toy::conv", "seam toy"))
            made.claims.append(Claim(f"scan_{index}", f"model.layers.{index}.scan", "toy.Scan", "toy::scan", "seam toy"))
            made.resources.append(ResourceEntry("state", f"scan_{index}", "slots", (4, 8), "float32", 128))
    made.resources.append(ResourceEntry("keys", "attend_2", "pages", (2, 8), "float32", 64, window=16, shared_by=("attend_5",)))
    members = ("model.layers.2.attention", "model.layers.5.attention")
    made.decisions = [Decision("toy::attend", "toy.attend.portable", "owner", {"toy.attend.vendor": "needs a GPU"}, members)]
    made.passes = [
        PassEntry("core.nothing", "CLEAN", "ad-core", 0, (), (), 0.001),
        PassEntry("core.insert_caches_into_everything", "CACHE", "ad-core", 10, ("one", "two", "three"), ("a note",), 0.002),
    ]
    made.memory, made.phases = {"weights": 20 << 20, "pools": 1 << 20, "total": 21 << 20, "cache tokens": 480}, {"export": 1.5}
    made.notes = ["numbers are <inert>"]
    return made


def test_claims_that_are_alike_are_one_kind(plan):
    found = [(kind.label, len(kind.claims), kind.keeps) for kind in kinds(plan)]
    assert found == [
        ("Conv", 4, ["nothing"]),
        ("Scan", 4, ["state [4, 8] float32, 128 B a sequence"]),
        ("Attend", 1, ["keys [2, 8] float32, 64 B a token, of the last 16 tokens"]),
        ("Attend", 1, ["nothing of its own: reads what model.layers.*.attention keeps"]),
    ]


def test_an_entry_of_several_tokens_says_so_and_counts_its_share(plan):
    plan.resources[-1] = ResourceEntry("sums", "attend_2", "pages", (2, 8), "float32", 64, every=4)
    assert kinds(plan)[2].keeps == ["sums [2, 8] float32, 64 B every 4 tokens"]
    assert cache_bytes(plan, "pages") == 16


def test_layers_hold_their_kinds_in_the_order_of_the_graph(plan):
    assert layers(plan, kinds(plan)) == [("0", [0, 1]), ("1", [0, 1]), ("2", [2]), ("3", [0, 1]), ("4", [0, 1]), ("5", [3])]


def test_a_mixer_outside_of_layers_stands_by_itself():
    plan = Plan(claims=[Claim("a", "first", "t.A", "t::a", "s"), Claim("b", "second", "t.A", "t::a", "s"), Claim("c", "", "", "t::a", "s")])
    assert [number for number, _ in layers(plan, kinds(plan))] == ["", "", ""]


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["a.0.b"], "a.0.b"),
        (["a.0.b", "a.1.b", "a.2.b"], "a.{0-2}.b"),
        (["a.0.b", "a.1.b", "a.4.b"], "a.{0-1, 4}.b"),
        ([f"a.{i}.b" for i in range(0, 40, 2)], "a.{0, 2, 4, ..., 38}.b"),
        (["a.0.b", "a.1.c"], "a.0.b to a.1.c"),
        (["a.0.b.0", "a.1.b.1"], "a.0.b.0 to a.1.b.1"),
        (["a.0", "b"], "a.0 to b"),
        (["a", "a"], "a"),
        (["conv1d.3", "conv1d.4"], "conv1d.{3-4}"),
    ],
)
def test_places_in_few_words(modules, expected):
    assert places(modules) == expected


@pytest.mark.parametrize("width", [60, 80, 200])
def test_names_stay_whole_on_the_terminal(plan, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    print_plan(plan)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    for name in ("model.layers.{0-1, 3-4}.scan.conv", "toy.attend.portable", "core.insert_caches_into_everything", "toy::attend"):
        assert name in text
    flat = re.sub(r"\s+", " ", text)
    for words in ("4 x Scan", "not toy.attend.vendor: needs a GPU", "Together they keep 64 B a token and 512 B a sequence.", plan.digest):
        assert words in flat


class _Page(HTMLParser):
    """Text of a page, its open elements, and anything that would be fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.open, self.foreign = "", [], []

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "link", "img", "iframe") or {"src", "href"} & {name for name, _ in attributes}:
            self.foreign.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_well_formed_fetches_nothing_and_says_what_the_plan_says(plan):
    page = _Page()
    page.feed(picture(plan))
    assert (page.open, page.foreign) == ([], [])
    for words in (
        "toy<3>",
        "a <reason>",
        "numbers are <inert>",
        "toy.attend.portable (owner)",
        "needs a GPU",
        "and 1 more declined",
        plan.digest,
    ):
        assert words in page.text
    drawn = picture(plan).split('class="layers"')[1].split('class="keys"')[0]
    assert drawn.count('class="layer"') == 6
    assert drawn.count("<i ") == len(plan.claims)


def test_a_plan_that_has_only_been_outlined_can_be_shown(plan, capsys):
    plan.memory, plan.phases, plan.decisions, plan.resources = {}, {}, [], []
    print_plan(plan)
    assert "the canonical op computes itself" in capsys.readouterr().out
    assert "Memory" not in picture(plan)
