"""The seams: every experts class of transformers computes the same through the op, and is left as it was."""

from __future__ import annotations

import ast
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ad_core.api import Seam
from ad_core.capture import export_module
from ad_moe.gating import Gating
from ad_moe.match.hf_experts import HfExpertsSeam, described
from ad_moe.match.recognise import recognised
from ad_moe.plugin import ad_ops

from .models import CONFIGS, ids, logits_of, plain, tiny

EVERY_SEAM = [each for op in ad_ops() for each in op.matchers if isinstance(each, Seam)]
MODELS = Path(transformers.__file__).parent / "models"
OUTSIDE = ("dbrx", "longcat_flash", "llama4_text", "jetmoe")
"""Types whose experts are not behind the interface."""


class Settings(SimpleNamespace):
    """What an experts module may want to read from its configuration; whatever has no value here is None."""

    def __getattr__(self, name: str) -> Any:
        return None


SETTINGS = Settings(
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 5),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), 16),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "moe_inter_dim"), 12),
    **dict.fromkeys(("hidden_act", "mlp_hidden_act"), "silu"),
    **{"swiglu_limit": 1.25, "swiglu_alpha": 1.702, "mlp_gate_softcap": 1.75, "mlp_up_softcap": 1.5, "post_norm_eps": 1e-5},
    **{"hidden_activation": "gelu_pytorch_tanh", "mlp_bias": False, "_experts_implementation": "eager"},
)


def behind_the_interface() -> list[tuple[str, str]]:
    """(module, class) of every class with the interface's decorator, read from the source: importing all takes a minute."""
    found = []
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        source = file.read_text()
        if "use_experts_implementation" in source:
            found += [
                (f"transformers.models.{file.parent.name}.{file.stem}", node.name)
                for node in ast.parse(source).body
                if isinstance(node, ast.ClassDef) and any("use_experts_implementation" in ast.unparse(mark) for mark in node.decorator_list)
            ]
    return found


OWN_GATES = {"gpt_oss", "deepseek_v4", "hy_v4", "beam", "inkling2", "minimax_m3_vl", "glm5_next", "openai_privacy_filter"}
FAST = OWN_GATES | {"muse_spark", "nemotron_h", "mixtral"}
CLASSES = [
    pytest.param(module, name, id=name, marks=() if module.split(".")[2] in FAST else pytest.mark.slow)
    for module, name in behind_the_interface()
]


def filled(part: nn.Module) -> nn.Module:
    """Weights as large as those of a trained model, from a seed."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in part.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 3 else 0.5
            parameter.copy_(2 * scale * torch.randn(parameter.shape, generator=generator))
    return part.eval().requires_grad_(False)


def test_the_list_of_classes_is_not_empty():
    assert len(CLASSES) > 40
    assert {module.split(".")[2] for module, _ in behind_the_interface()} >= {"mixtral", "gpt_oss", "nemotron_h"}


@pytest.mark.parametrize(("module", "name"), CLASSES)
def test_every_class_behind_the_interface_gives_the_same_through_the_op(module, name):
    part = filled(getattr(import_module(module), name)(SETTINGS))
    assert isinstance(described(part), Gating), described(part)
    generator = torch.Generator().manual_seed(0)
    tokens = 2 * torch.randn(11, 16, generator=generator)
    selected = torch.rand(11, 5, generator=generator).topk(2, -1).indices
    weights = torch.rand(11, 2, generator=generator)
    wanted = part(tokens, selected, weights)
    counts: Counter[str] = Counter()
    seam = HfExpertsSeam()
    before = dict(vars(part))
    with seam.open(nn.ModuleList([part]), lambda op: counts.update([op])):
        result = part(tokens, selected, weights)
    assert counts == {"ad_moe::moe": 1}
    assert vars(part) == before
    torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


def test_a_limit_behind_the_activation_is_recognised():
    class Limited(nn.Module):
        def __init__(self):
            super().__init__()
            self.bound = 0.75

        def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, -1)
            return nn.functional.silu(gate).clamp(max=self.bound) * up.clamp(-self.bound, self.bound)

    part = Limited()
    assert recognised(part.gate, part, "concatenated") == Gating(limit=0.75, limit_activated=True)


def test_a_gate_that_the_op_does_not_know_is_declined_with_its_class():
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    class Strange(MixtralExperts):
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, -1)
            return torch.sin(gate) * up

    part = filled(Strange(SETTINGS))
    declined = HfExpertsSeam().applies(nn.ModuleList([part]))
    assert declined is not None
    assert "Strange has a gate that is none of those that the op knows" in declined.reason


def test_layers_of_one_class_with_other_numbers_are_tried_apart():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    seam, parts = HfExpertsSeam(), [filled(GptOssExperts(SETTINGS)) for _ in range(3)]
    parts[1].limit = 0.5
    parts[2]._apply_gate = lambda gate_up: torch.sin(gate_up[..., ::2])
    found = [seam._described(part) for part in parts]
    assert [each.limit for each in found[:2]] == [1.25, 0.5]
    assert isinstance(found[2], str)


def test_a_norm_in_another_order_is_declined():
    module = pytest.importorskip("transformers.models.muse_spark.modeling_muse_spark")
    part = filled(module.MuseSparkExperts(SETTINGS))
    part.post_expert_norm.forward = lambda x: x * (1 + part.post_expert_norm.weight)
    assert "normalises" in str(described(part))


def test_a_model_without_experts_declines_every_seam():
    model = plain_dense()
    assert len(EVERY_SEAM) == 8
    assert all(seam.applies(model) is not None for seam in EVERY_SEAM)


def plain_dense() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    )


@contextmanager
def every_seam(module: nn.Module, counts: Counter[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for seam in EVERY_SEAM:
            if seam.applies(module) is None:
                stack.enter_context(seam.open(module, lambda op: counts.update([op])))
        yield


@pytest.mark.parametrize("kind", OUTSIDE)
def test_experts_outside_of_the_interface_give_the_same_through_the_op(kind):
    module, counts = tiny(kind), Counter()
    before = [dict(vars(part)) for part in module.modules()]
    wanted = logits_of(module, ids(33))
    with every_seam(module, counts):
        result = logits_of(module, ids(33))
    assert counts["ad_moe::moe"] >= 1
    assert [dict(vars(part)) for part in module.modules()] == before
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


class AriaExperts(nn.Module):
    """As transformers 5.17 has them: they route for themselves, and a stack lies in a module of its own. Its products, one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Module(), nn.Module()
        self.fc1.weight, self.fc2.weight = nn.Parameter(torch.empty(5, 16, 24)), nn.Parameter(torch.empty(5, 12, 16))

    def route_tokens_to_experts(self, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best, selected = router_logits.topk(2, dim=1)
        return selected, best.softmax(-1)

    def forward(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden_states)
        for token, (selected, weights) in enumerate(zip(*self.route_tokens_to_experts(router_logits), strict=True)):
            for expert, weight in zip(selected.tolist(), weights, strict=True):
                gate, up = (hidden_states[token] @ self.fc1.weight[expert]).chunk(2)
                result[token] += weight * ((nn.functional.silu(gate) * up) @ self.fc2.weight[expert])
        return result


def test_experts_that_route_for_themselves_give_the_same_through_the_op():
    module, counts = nn.ModuleList([filled(AriaExperts())]), Counter()
    generator = torch.Generator().manual_seed(0)
    tokens, logits = torch.randn(11, 16, generator=generator), torch.randn(11, 5, generator=generator)
    wanted = module[0](tokens, logits)
    with every_seam(module, counts):
        result = module[0](tokens, logits)
    assert counts == {"ad_moe::moe": 1}
    torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3_moe", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mixtral", "gpt_oss", *OUTSIDE))])
def test_capture_does_not_grow_with_the_number_of_experts(kind):
    """On meta: the same graph for 4 experts and for 128, in about the same time."""
    graphs, seconds = {}, {}
    for number in (4, 128):
        changes: dict[str, Any] = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), number)
        if kind == "dbrx":
            changes = {"ffn_config": {**CONFIGS["dbrx"]["ffn_config"], "moe_num_experts": number}}
        with torch.device("meta"):
            module = plain(kind, **changes)
        assert max(tensor.shape[0] for tensor in module.parameters() if tensor.dim() == 3 or kind == "dbrx") >= number
        started = time.perf_counter()
        with every_seam(module, Counter()):
            graphs[number] = [str(node.target) for node in export_module(module).graph.graph.nodes]
        seconds[number] = time.perf_counter() - started
    assert "ad_moe.moe.default" in graphs[4]
    assert graphs[128] == graphs[4]
    assert seconds[128] < 2 * seconds[4] + 1
