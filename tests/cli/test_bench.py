"""`ad bench` measures what it says, on work of the size that it says."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from typer.testing import CliRunner

from ad_core import LLM
from ad_core.api.errors import ConfigError
from ad_core.cli import bench as module
from ad_core.cli.main import build
from ad_core.plan import Plan, ResourceEntry


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of two layers in Hugging Face's form, without a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "max_position_embeddings": 128}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=1)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, memory="1MiB", prefix_cache=False) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _small_read(monkeypatch):
    monkeypatch.setattr(module, "READ_BYTES", 1 << 20)


def run(*words) -> str:
    done = CliRunner().invoke(build(["bench", "plugins"]), ["bench", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_json_has_the_work_that_was_asked_for_and_rates_that_agree(folder):
    sizes = ("--in", 8, "--out", 4, "--requests", 3, "--repetitions", 2)
    found = json.loads(run(folder, *sizes, "--memory", "1MiB", "--dtype", "float32", "--json"))
    assert (found["input_tokens"], found["output_tokens"], found["requests"], found["repetitions"]) == (8, 4, 3, 2)
    for name in ("first_token_s", "decode_tokens_s", "new_tokens_s", "total_tokens_s"):
        assert 0 < found[name]["least"] <= found[name]["median"] <= found[name]["most"]
    # all tokens are 12 a request, new ones 4, in the same seconds
    assert found["total_tokens_s"]["median"] == pytest.approx(3 * found["new_tokens_s"]["median"])
    band = found["bandwidth"]
    assert band["gb_s"] == pytest.approx(band["bytes_per_token"] * found["decode_tokens_s"]["median"] / 1e9)
    assert band["share"] == pytest.approx(band["gb_s"] / band["memory_gb_s"])
    # two embeddings of 96 x 32; a layer: 4 + 2 + 2 + 4 heads of 8, three matrices of 64, two norms; the last norm; rotary table
    parameters = 2 * 96 * 32 + 2 * (12 * 8 * 32 + 3 * 64 * 32 + 2 * 32) + 32
    cache = 10 * 2 * 2 * (2 * 8) * 4  # tokens, layers, key and value, entry, bytes
    assert 0 <= band["bytes_per_token"] - 4 * parameters - cache <= 64


def test_answers_have_the_length_asked_for_whatever_the_model_wants_to_say(llm):
    sampled, ended = llm.stats.sampled_tokens, llm.stats.finished["length"]
    module.measure(llm, 6, 5, 3, 1)
    # a warm-up and a repetition, each one request alone and three together
    assert llm.stats.sampled_tokens - sampled == 2 * (1 + 3) * 5
    assert llm.stats.finished["length"] - ended == 8
    assert llm.stats.finished.total() == llm.stats.finished["length"]
    assert llm.stats.reused_tokens == 0


def test_a_request_that_does_not_fit_is_refused_with_both_numbers(llm):
    with pytest.raises(ConfigError, match=r"100 and 64 .* 128"):
        module.measure(llm, 100, 64, 1, 1)


def test_a_person_reads_medians_and_the_share_of_the_memory(llm):
    text = "\n".join(module.lines(llm.plan, module.measure(llm, 4, 3, 1, 1)))
    assert "one request of 4 tokens in, 3 out" in text
    assert "1 request at once" in text
    assert "that the memory gives to a plain read" in text


def plan(*entries: ResourceEntry) -> Plan:
    made = Plan(resources=list(entries))
    made.memory["weights"] = 1000
    return made


def entry(kind: str, unit: int, **more) -> ResourceEntry:
    return ResourceEntry("r", "n", kind, (unit,), "int8", unit, **more)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], 1000),
        ([entry("pages", 3)], 1000 + 50 * 3),
        ([entry("pages", 3, window=20)], 1000 + 20 * 3),
        ([entry("pages", 3, window=90)], 1000 + 50 * 3),
        ([entry("slots", 7)], 1000 + 7),
        ([entry("pages", 3, shared_by=("a", "b"))], 1000 + 3 * 50 * 3),
        ([entry("pages", 3, every=4)], 1000 + 12 * 3),
    ],
    ids=["weights", "pages", "window", "wide window", "slots", "shared", "entries of four tokens"],
)
def test_a_token_reads_weights_once_and_what_each_node_looks_back_on(entries, expected):
    assert module.bytes_per_token(plan(*entries), 50) == expected


def test_the_memory_is_measured_in_gigabytes_a_second(monkeypatch):
    ticks = iter(range(0, 100, 2))  # every read takes two seconds
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    assert module.memory_gb_s(torch.device("cpu")) == pytest.approx((1 << 20) / 2 / 1e9)
