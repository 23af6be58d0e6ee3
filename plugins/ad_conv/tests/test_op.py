"""The canonical op against the sum that defines it, term by term in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ad_conv import op
from ad_conv.op import causal_conv1d


def by_hand(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    width, out = weight.shape[1], torch.zeros_like(x, dtype=torch.float64)
    for t in range(x.shape[1]):
        for k in range(width):
            if t - width + 1 + k >= 0:
                out[:, t] += weight[:, k].double() * x[:, t - width + 1 + k].double()
    out = out if bias is None else out + bias.double()
    return out * torch.sigmoid(out) if activation else out


@pytest.mark.parametrize("length", [1, 2, 7, 63, 100])
@pytest.mark.parametrize("width", [1, 2, 4, 9])
@pytest.mark.parametrize(("biased", "activation"), [(True, "silu"), (False, "")])
def test_it_is_the_sum_that_defines_it(length: int, width: int, biased: bool, activation: str) -> None:
    draw = torch.Generator().manual_seed(length)
    x, weight = torch.randn(2, length, 5, generator=draw), torch.randn(5, width, generator=draw)
    bias = torch.randn(5, generator=draw) if biased else None
    result = causal_conv1d(x, weight, bias, activation=activation)
    torch.testing.assert_close(result.double(), by_hand(x, weight, bias, activation), rtol=1e-5, atol=1e-5)


def test_it_is_what_torch_computes_with_padding_and_a_cut() -> None:
    x, weight, bias = torch.randn(2, 11, 6), torch.randn(6, 4), torch.randn(6)
    padded = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=6)[..., :11]
    torch.testing.assert_close(causal_conv1d(x, weight, bias), padded.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_once() -> None:
    x, weight = torch.randn(1, 30, 8).bfloat16(), torch.randn(8, 4).bfloat16()
    expected = causal_conv1d(x.float(), weight.float(), activation="silu").bfloat16()
    assert torch.equal(causal_conv1d(x, weight, activation="silu"), expected)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="gelu"):
        causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 2), activation="gelu")


def test_blocks_of_a_long_sequence_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "BLOCK", 40)
    x, weight = torch.randn(2, 31, 5), torch.randn(5, 4)
    torch.testing.assert_close(causal_conv1d(x, weight).double(), by_hand(x, weight, None, ""), rtol=1e-5, atol=1e-5)
