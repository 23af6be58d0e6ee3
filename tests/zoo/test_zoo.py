"""Every model type of the zoo: captured, served, equal to its author's module, from memory and from disk."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import pytest
from packaging.version import Version

from .check import contradiction, logits_of
from .models import TRANSFORMERS, Entry, build, entries, prompt
from .page import page
from .pool import Worker
from .sound import unsound

CORE = ("llama", "gemma2", "bloom", "camembert", "gemma3n_text", "deepseek_v32", "doge", "zaya")
"""Grouped heads, windows with a soft-cap, a pattern with ALiBi, positions of its own, shared keys, a latent with an indexer, a bias of
keys, and convolutions before attention."""
LIMIT = 180.0


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def older_than_the_zoo() -> bool:
    """Whether a fault of an author's module may be one that transformers has mended since: Doge's looked ahead in 5.17."""
    return Version(version("transformers")) < Version(TRANSFORMERS)


def _param(entry: Entry) -> object:
    return pytest.param(entry.model_type, marks=() if entry.model_type in CORE else pytest.mark.slow)


@pytest.mark.parametrize("model_type", [_param(entry) for entry in entries().values() if entry.status == "ok"])
def test_answers_are_those_of_the_authors_module(model_type, worker):
    result = worker.run(model_type, LIMIT)
    if result["status"] == "upstream" and older_than_the_zoo():
        pytest.skip(result["reason"])
    assert result["status"] == "pass", f"{result['stage']}: {result['reason']}"
    assert result["mixers"], "nothing that mixes tokens was claimed"


@pytest.mark.parametrize("model_type", [entry.model_type for entry in entries().values() if entry.status == "noncausal"])
def test_what_is_called_noncausal_changes_its_answers_when_tokens_follow(model_type):
    assert "looks ahead" in contradiction(build(entries()[model_type]))


def test_a_causal_module_does_not():
    assert contradiction(build(entries()["llama"])) is None


def test_reformers_hashes_sort_the_whole_sequence_into_chunks_so_what_a_token_sees_depends_on_what_follows():
    """While two chunks (of 8) hold all tokens each sees all before it; from then on its chunk is decided by the others, later ones too."""
    reformer, ids = build(entries()["reformer"]), prompt(24)
    short, long = logits_of(reformer, ids[:16]), logits_of(reformer, ids)
    assert (logits_of(reformer, ids[:9]) - short[:9]).abs().max() < 1e-4
    assert (short - long[:16]).abs().max() > 0.1
    assert (logits_of(reformer, ids) == long).all(), "its rotations are drawn with a seed"


@pytest.mark.parametrize("model_type", [_param(entry) for entry in entries().values() if entry.status == "ok"])
def test_an_entry_is_causal_and_hears_its_first_token(model_type):
    reason = unsound(build(entries()[model_type]))
    if reason is not None and older_than_the_zoo():
        pytest.skip(reason)
    assert reason is None


def test_what_looks_ahead_forgets_or_computes_no_numbers_is_no_oracle():
    module = build(entries()["llama"])
    forward = module.forward

    def patched(change):
        def changed(**given):
            output = forward(**given)
            output.logits = change(output.logits, given["input_ids"])
            return output

        return changed

    module.forward = patched(lambda logits, ids: logits + logits.mean(1, keepdim=True))
    assert "not causal" in unsound(module)
    module.forward = patched(lambda logits, ids: logits + 0.01 * ids.shape[1])
    assert "not causal" in unsound(module)
    module.forward = patched(lambda logits, ids: module.get_input_embeddings()(ids))
    assert "do not depend on the first" in unsound(module)
    module.forward = patched(lambda logits, ids: logits / 0)
    assert "not finite" in unsound(module)


def test_an_entry_that_hangs_costs_that_entry(worker):
    result = worker.run("llama", 0.2)
    assert (result["status"], result["stage"]) == ("fail", "time")
    assert worker.run("gpt2", LIMIT)["status"] == "pass"


def test_the_page_has_a_row_for_every_type_and_says_what_was_not_run():
    results = {"llama": {"status": "pass", "mixers": {"toy::mix": 2}, "captured_by": ["seam"]}}
    results["bloom"] = {"status": "fail", "stage": "capture", "reason": "a | b"}
    results["doge"] = {"status": "upstream", "stage": "capture", "reason": "looks ahead"}
    results["xlnet"] = {"status": "upstream", "stage": "capture", "reason": "looks ahead"}
    text = page(entries(), results, "transformers 5")
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == len(entries()) + 1
    assert "| llama | works | `toy::mix` x 2 | seam | - | - |" in text
    assert "| bloom | fails | - | - | capture | a \\| b |" in text
    assert "| gpt2 | not run |" in text
    assert "| doge | upstream | - | - | capture | looks ahead |" in text
    assert f"| xlnet | upstream | - | - | capture | {entries()['xlnet'].note} |" in text
