"""Norms in C against float64, and the pass that puts them into graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ad_core
from ad_core.graph.edit import is_op
from ad_fusion.norm import LIBRARY, rms_norm

pytestmark = pytest.mark.skipif(LIBRARY.declined(torch.float32) is not None, reason=str(LIBRARY.declined(torch.float32)))
HALF = (torch.bfloat16, torch.float16)


def written_out(x, weight, eps, round_first, dtype):
    """The norm as models write it, in float64 up to where it is rounded."""
    wide = x.double()
    result = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if round_first:
        result = result.to(dtype).double()
    return (result if weight is None else result * weight.double()).to(dtype)


def laid_out(how, width):
    wide = torch.randn(1, 7, 3 * 4 * width, generator=torch.Generator().manual_seed(0))
    match how:
        case "contiguous":
            return wide[..., : 4 * width].contiguous()
        case "part of a projection":
            return wide[..., 4 * width : 8 * width]
        case "heads of a part":
            return wide[..., 4 * width : 8 * width].unflatten(-1, (4, width))
        case "every other number":
            return wide[..., ::2][..., :width]
        case "a matrix":
            return wide[0, :, :width]
        case "five dimensions":
            return wide.view(1, 7, 3, 4, width).transpose(1, 2)
    raise AssertionError(how)


@pytest.mark.parametrize("width", [7, 64, 80])
@pytest.mark.parametrize(
    "how", ["contiguous", "part of a projection", "heads of a part", "every other number", "a matrix", "five dimensions"]
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_rows_wherever_they_lie_are_those_of_float64(how, width, dtype):
    x = laid_out(how, width).to(dtype)
    weight = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(1)).to(dtype)
    for given, round_first in ((weight, True), (weight, False), (weight.float(), False), (None, False)):
        for source in {x.dtype: x, torch.float32: x.float()}.values():
            result = rms_norm(source, given, 1e-5, round_first, dtype)
            assert result.is_contiguous()
            assert (result.shape, result.dtype) == (x.shape, dtype)
            torch.testing.assert_close(result, written_out(source, given, 1e-5, round_first, dtype))


def test_what_is_no_number_stays_in_its_row():
    x = torch.ones(3, 16)
    x[1, 5] = torch.nan
    result = rms_norm(x, None, 0.0, False, torch.float32)
    assert result[1].isnan().all()
    assert (result[[0, 2]] == 1).all()


class Norm(nn.Module):
    """A norm in one of the ways in which models write it, between an embedding and a head."""

    def __init__(self, way, dtype):
        super().__init__()
        self.way, self.scale = way, nn.Parameter(torch.rand(16) + 0.5)
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.to(dtype)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        wide = x.to(torch.float32)
        match self.way:
            case "weight after the cast":
                result = self.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
            case "weight before the cast":
                result = (wide * torch.rsqrt((wide * wide).mean(2, keepdim=True) + 1e-6) * (1.0 + self.scale.float())).type_as(x)
            case "no weight":
                result = (torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * wide).to(x.dtype)
            case "something between":
                wide = wide * torch.nn.functional.silu(wide)
                normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).unflatten(-1, (2, 8))
                result = self.scale * normed.flatten(-2).to(x.dtype)
            case "another power":
                result = (wide * torch.rsqrt(wide.pow(4).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
            case "over the tokens":
                result = (wide * torch.rsqrt(wide.pow(2).mean(0, keepdim=True) + 1e-6)).to(x.dtype)
            case "a second reader":
                root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
                result = (wide * root).to(x.dtype) + root.to(x.dtype)
        return self.head(result)


WAYS = ("weight after the cast", "weight before the cast", "no weight", "something between")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [*WAYS, "another power", "over the tokens", "a second reader"])
def test_the_pass_finds_norms_as_models_write_them_and_nothing_else(way, dtype):
    module, ids = Norm(way, dtype), torch.arange(12).view(2, 6)
    compiled = ad_core.compile(module, max_model_len=16, verify=True)
    (report,) = [each for each in compiled.plan.passes if each.name == "fusion.norms"]
    assert report.matched == (way in WAYS), report.declined
    nodes = list(compiled.graph.graph.nodes)
    assert any(is_op(node, "aten::rsqrt") for node in nodes) != any(is_op(node, "ad_fusion::rms_norm") for node in nodes)
    if way in WAYS[:3]:
        assert not any(is_op(node, "aten::to", "aten::type_as") for node in nodes if node.users and node.meta["val"].dtype == dtype)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), module(ids), rtol=2e-2 if dtype in HALF else 1e-5, atol=2e-2 if dtype in HALF else 1e-5)


def test_without_a_compiler_the_graph_stays_as_it_was(monkeypatch):
    from ad_core.api import Declined

    monkeypatch.setattr(type(LIBRARY), "declined", lambda self, dtype: Declined("there is no C compiler"))
    compiled = ad_core.compile(Norm("no weight", torch.float32), max_model_len=16)
    (report,) = [each for each in compiled.plan.passes if each.name == "fusion.norms"]
    assert (report.matched, list(report.declined)) == (0, ["rsqrt: there is no C compiler"])
