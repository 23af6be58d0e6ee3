"""Weights from disk: the tensors that transformers' own loading gives, and an error with names and shapes for everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ad_core.api.errors import CheckpointError, GraphInvalidError
from ad_core.capture import export_module, load_weights, open_model
from ad_core.capture.tensor_file import TensorFile
from ad_core.graph.edit import tensor_at, tensors_read

from .models import CONFIGS, build, prompt, run


def theirs(folder: Path, dtype="auto"):
    """The oracle: what from_pretrained loads."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_equals_that_of_from_pretrained(kind, tmp_path):
    build(kind).save_pretrained(tmp_path)
    assert_same(open_model(tmp_path).weights("cpu"), theirs(tmp_path)[1])


def test_stacked_experts_were_stored_one_by_one(tmp_path):
    build("mixtral").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not stored.keys() >= {"model.layers.0.mlp.experts.gate_up_proj"}
    assert any(".experts.3." in name for name in stored)


def test_parts_are_read_and_the_dtype_is_changed_on_the_way(tmp_path):
    build("mixtral").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same(open_model(tmp_path, dtype="bfloat16").weights("cpu"), theirs(tmp_path, torch.bfloat16)[1])


def test_large_tensors_are_converted_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("ad_core.capture.tensor_file._PIECE", 100)
    values = torch.randn(37, 11)
    save_file({"a": values, "b": torch.tensor(3.5), "c": torch.arange(5), "empty": torch.empty(0, 4)}, tmp_path / "x.safetensors")
    stored = TensorFile(tmp_path / "x.safetensors").tensors
    assert torch.equal(stored["a"].read(torch.float16), values.half())
    assert torch.equal(stored["b"].read(torch.bfloat16), torch.tensor(3.5).bfloat16())
    assert torch.equal(stored["c"].read(), torch.arange(5))
    assert stored["empty"].read(torch.float16).shape == (0, 4)


def test_tied_weights_share_memory_and_separate_ones_do_not(tmp_path):
    build("llama").save_pretrained(tmp_path)
    weights = open_model(tmp_path).weights("cpu")
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    rewrite(tmp_path, lambda stored: {**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()})
    weights = open_model(tmp_path).weights("cpu")
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    rewrite(tmp_path, lambda stored: {**stored, "lm_head.weight": stored["model.embed_tokens.weight"] + 1})
    source = open_model(tmp_path)
    assert_same(source.weights("cpu"), theirs(tmp_path)[1])
    graph = export_module(source.module).graph
    load_weights(graph, source, "cpu")
    assert torch.equal(tensor_at(graph, "lm_head.weight"), tensor_at(graph, "model.embed_tokens.weight") + 1)


def test_a_tied_weight_may_be_stored_under_its_other_name(tmp_path):
    build("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda stored: {("lm_head.weight" if "embed" in name else name): value for name, value in stored.items()})
    assert_same(open_model(tmp_path).weights("cpu"), theirs(tmp_path)[1])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "opt", "qwen3", "mixtral"])
def test_a_directory_becomes_a_graph_that_computes_the_model(kind, tmp_path):
    build(kind).save_pretrained(tmp_path)
    source = open_model(tmp_path)
    graph = export_module(source.module, max_length=source.max_model_len).graph
    seen = []
    held = load_weights(graph, source, "cpu", lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert held == sum({id(t): t.nbytes for name in tensors_read(graph) for t in [tensor_at(graph, name)]}.values())
    assert all(tensor.is_meta for tensor in source.module.parameters())
    ids = prompt(2, 11)
    with torch.no_grad():
        torch.testing.assert_close(run(graph, ids), theirs(tmp_path)[0](input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_the_module_and_the_graph_share_the_weights_until_they_are_released(tmp_path):
    build("llama").save_pretrained(tmp_path)
    source = open_model(tmp_path)
    module = source.runnable("cpu")
    assert module.get_parameter("model.layers.0.self_attn.q_proj.weight") is source.weights("cpu")["model.layers.0.self_attn.q_proj.weight"]
    ids = prompt(1, 6)
    with torch.no_grad():
        assert torch.equal(module(input_ids=ids).logits, theirs(tmp_path)[0](input_ids=ids).logits)
    source.release()
    assert all(tensor.is_meta for tensor in source.module.parameters())


def cut(tensors, name="model.layers.1.mlp.up_proj.weight"):
    return {key: value for key, value in tensors.items() if key != name}


def reshaped(tensors, name="model.layers.1.mlp.up_proj.weight"):
    return {**tensors, name: tensors[name][:-1].contiguous()}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", cut, r"1 of the model's \d+ tensors are not in the checkpoint: model\.layers\.1\.mlp\.up_proj\.weight \[48, 32\]"),
        (
            "llama",
            reshaped,
            r"'model\.layers\.1\.mlp\.up_proj\.weight' has the shape \[47, 32\] in the checkpoint and \[48, 32\] in the model",
        ),
        ("llama", lambda stored: {}, r"tensors are not in the checkpoint: .* \.\.\."),
        (
            "mixtral",
            lambda stored: reshaped(stored, "model.layers.1.block_sparse_moe.experts.2.w1.weight"),
            r"(?s)do not fit together to 'model\.layers\.1\.mlp\.experts\.gate_up_proj'.*w1\.weight \[4",
        ),
        (
            "mixtral",
            lambda stored: {key: value for key, value in stored.items() if "layers.1.block_sparse_moe.experts.3." not in key},
            r"experts.* has the shape \[3, .*\] in the checkpoint and \[4, .*\] in the model",
        ),
    ],
    ids=["missing", "wrong-shape", "empty", "experts-do-not-fit", "an-expert-is-missing"],
)
def test_tensors_that_do_not_belong_to_the_model_are_an_error(kind, change, message, tmp_path):
    build(kind).save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path).weights("cpu")


def test_truncated_and_missing_files_are_an_error(tmp_path):
    build("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"(?s)no whole safetensors file.*the file has {length} bytes"):
            open_model(tmp_path)
    path.write_bytes(whole)
    source = open_model(tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="the file ends inside the tensor"):
        source.weights("cpu")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        source.weights("cpu")
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"1 of the checkpoint's .* parts are missing: model-00002"):
        open_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        open_model(tmp_path)


def test_the_files_may_change_once_the_weights_are_loaded(tmp_path):
    build("llama").save_pretrained(tmp_path)
    weights = open_model(tmp_path).weights("cpu")
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(weights["model.norm.weight"], build("llama").model.norm.weight)


def test_a_graph_with_a_tensor_nobody_fills_is_an_error(tmp_path):
    build("llama").save_pretrained(tmp_path)
    source = open_model(tmp_path)
    graph = export_module(source.module).graph
    node = next(node for node in graph.graph.nodes if node.op == "get_attr")
    graph.register_buffer("made_by_a_pass", torch.empty(3, device="meta"))
    node.target = "made_by_a_pass"
    with pytest.raises(GraphInvalidError, match="'made_by_a_pass', which has no value"):
        load_weights(graph, source, "cpu")


def test_a_directory_of_the_model_without_its_head_is_named_accordingly(tmp_path):
    model = build("llama")
    model.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    assert_same(open_model(tmp_path).weights("cpu"), theirs(tmp_path)[1])
