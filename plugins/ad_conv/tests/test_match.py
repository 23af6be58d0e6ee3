"""How convolutions are found: modules in plain PyTorch, one for each spelling, through the engine; and what is declined."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ad_core import LLM, SamplingParams, compile
from ad_core.api.errors import CaptureError, UnclaimedMixerError

C, K = 12, 4


class Model(nn.Module):
    """One convolution between an embedding and a head. `convolve` gets the transposed input [B, C, S] and the layer."""

    def __init__(self, layer: nn.Conv1d, convolve: Callable[[torch.Tensor, nn.Conv1d], torch.Tensor]):
        super().__init__()
        self.embed, self.conv, self.head, self.convolve = nn.Embedding(40, C), layer, nn.Linear(C, 40), convolve

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.convolve(x.transpose(1, 2), self.conv).transpose(1, 2))


def depthwise(padding: int, bias: bool = True, width: int = K) -> nn.Conv1d:
    return nn.Conv1d(C, C, width, groups=C, padding=padding, bias=bias)


def model(layer: nn.Conv1d, convolve: Callable[[torch.Tensor, nn.Conv1d], torch.Tensor]) -> Model:
    torch.manual_seed(0)
    made = Model(layer, convolve).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.normal_()
    return made


SPELLINGS = {
    "cut": (depthwise(K - 1), lambda x, conv: conv(x)[..., : x.shape[-1]]),
    "cut and silu": (depthwise(K - 1), lambda x, conv: F.silu(conv(x)[:, :, : x.shape[2]])),
    "cut from the end": (depthwise(K - 1, bias=False), lambda x, conv: conv(x)[..., : 1 - K]),
    "padded": (depthwise(0), lambda x, conv: conv(F.pad(x, (K - 1, 0)))),
    "zeros in front": (depthwise(0, bias=False), lambda x, conv: conv(torch.cat([x.new_zeros(x.shape[0], C, K - 1), x], -1)).sigmoid()),
    "functional": (depthwise(0), lambda x, conv: F.conv1d(x, conv.weight, conv.bias, padding=K - 1, groups=C)[:, :, : x.shape[-1]]),
    "two taps": (depthwise(1, width=2), lambda x, conv: conv(x)[..., :-1]),
    "dilated": (nn.Conv1d(C, C, 3, dilation=4, groups=C), lambda x, conv: F.silu(conv(F.pad(x, (8, 0))))),
    "dilated and cut": (nn.Conv1d(C, C, K, dilation=3, padding=9, groups=C), lambda x, conv: conv(x)[..., : x.shape[-1]]),
}


FAST = ("cut and silu", "padded", "dilated")


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SPELLINGS])
def test_a_spelling_is_found_and_served(name: str) -> None:
    module = model(*SPELLINGS[name])
    with LLM(module, max_model_len=48, max_batch_tokens=8, page_size=4, memory="1MiB", allow_plugins=["conv"]) as llm:
        prompts = [[5], list(range(3, 12)), list(range(2, 35))]
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
        assert [claim.op for claim in llm.plan.claims] == ["ad_conv::causal_conv1d"]
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(module(torch.tensor([ids]))[0, -1].argmax()))
        assert list(output.outputs[0].token_ids) == ids[len(prompt) :]


REFUSED = {
    "symmetric": (depthwise(0), lambda x, conv: F.conv1d(x, conv.weight, padding="same", groups=C), "same"),
    "looks ahead": (depthwise(K - 1), lambda x, conv: conv(x)[..., 1 : x.shape[-1] + 1], "first outputs"),
    "tail read twice": (depthwise(K - 1), lambda x, conv: (lambda y: y[..., : 1 - K] + y[..., K - 1 :])(conv(x)), "several"),
    "padded on the right": (depthwise(0), lambda x, conv: conv(F.pad(x, (0, K - 1))), "causal"),
    "padded with ones": (depthwise(0), lambda x, conv: conv(F.pad(x, (K - 1, 0), value=1.0)), "causal"),
    "mixes channels": (nn.Conv1d(C, C, K), lambda x, conv: conv(F.pad(x, (K - 1, 0))), "mixes channels"),
    "dilated and looks ahead": (nn.Conv1d(C, C, 2, dilation=3, groups=C), lambda x, conv: conv(F.pad(x, (1, 2))), "kernel of 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_causal_filter_is_declined_with_its_reason(name: str) -> None:
    layer, convolve, reason = REFUSED[name]
    assert reason in _notes(model(layer, convolve))


def test_a_model_with_a_convolution_that_nobody_claims_is_refused() -> None:
    layer, convolve, _ = REFUSED["mixes channels"]
    with pytest.raises((UnclaimedMixerError, CaptureError), match="conv"):
        compile(model(layer, convolve), max_model_len=48, allow_plugins=["conv"])


def _notes(module: nn.Module) -> str:
    """What the matcher says of the module's graph."""
    from ad_conv.match.aten import AtenConv1dMatcher
    from ad_core.api import Declined

    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(module, (torch.zeros(1, 7, dtype=torch.int64),), dynamic_shapes=({1: length},), strict=False)
    found = list(AtenConv1dMatcher().find(exported.graph_module))
    assert all(isinstance(entry, Declined) for entry in found)
    return "; ".join(entry.reason for entry in found if isinstance(entry, Declined))
