"""Rotary embedding in C against the operations it stands for, and the pass that puts it into graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ad_core
from ad_core.graph.edit import is_op
from ad_fusion.rotary import LIBRARY, rotary

pytestmark = pytest.mark.skipif(LIBRARY.declined(torch.float32) is not None, reason=str(LIBRARY.declined(torch.float32)))


def turned(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def written_out(x, cosine, sine):
    return x * cosine + turned(x) * sine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [2, 10, 64, 128])
@pytest.mark.parametrize("how", ["heads before tokens", "tokens before heads", "part of a projection", "every other number"])
def test_rows_wherever_they_lie_are_those_of_the_operations(how, width, dtype):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 5, 3, 2 * width, generator=generator).to(dtype)
    x = {
        "heads before tokens": wide[..., :width].contiguous().transpose(1, 2),
        "tokens before heads": wide[..., :width].contiguous(),
        "part of a projection": wide[..., width:].transpose(1, 2),
        "every other number": wide[..., ::2],
    }[how]
    tokens = 1 if x.shape[1] == 5 else 2
    shape = [1, 1, 1, width]
    shape[tokens] = 5
    cosine, sine = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(2))
    for angles in ((cosine, sine), (cosine.expand(2, *shape[1:]), sine.expand(x.shape).contiguous())):
        for swapped in (False, True):
            result = rotary(x, *angles, swapped)
            torch.testing.assert_close(result, written_out(x, *angles), rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)
            assert (result.transpose(1, 2) if swapped else result).is_contiguous()


class Rotated(nn.Module):
    def __init__(self, way, dtype):
        super().__init__()
        self.way = way
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.to(dtype)

    def forward(self, input_ids, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = self.embed(input_ids).unflatten(-1, (2, 8)).transpose(1, 2)
        angles = position_ids[:, None, :, None] * torch.arange(1, 9) / 9
        cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        half = torch.cat((-x[..., 4:], x[..., :4]), -1)
        match self.way:
            case "slices":
                result = (x * cosine) + (half * sine)
            case "chunks":
                result = sine * turned(x) + cosine * x
            case "a part of each head":
                x, rest = x[..., :4], x[..., 4:]
                result = torch.cat((x * cosine[..., :4] + turned(x) * sine[..., :4], rest), -1)
            case "scaled after the exchange":
                x = self.embed(input_ids).unflatten(-1, (2, 8)).transpose(1, 2) * 0.5
                result = x * cosine + turned(x) * sine
            case "one of three":
                x = torch.cat([self.embed(input_ids)] * 3, -1).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)[1]
                result = x * cosine + turned(x) * sine
            case "one angle a token":
                result = x * cosine[..., :1] + half * sine[..., :1]
            case "float32 angles":
                result = (x * cosine.float() + half * sine.float()).to(x.dtype)
            case "thirds":
                result = x * cosine + torch.cat((-x[..., 3:], x[..., :3]), -1) * sine
            case "the other sign":
                result = x * cosine + torch.cat((x[..., 4:], -x[..., :4]), -1) * sine
            case "a second reader":
                result = x * cosine + half * sine + half
        return self.head(result.transpose(1, 2).reshape(*input_ids.shape, 16))


WAYS = ("slices", "chunks", "a part of each head", "scaled after the exchange", "one of three")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [*WAYS, "one angle a token", "thirds", "the other sign", "a second reader"])
def test_the_pass_finds_rotations_as_models_write_them_and_nothing_else(way, dtype):
    module, ids, allowed = Rotated(way, dtype), torch.arange(12).view(2, 6), 1e-5 if dtype == torch.float32 else 1e-2
    compiled = ad_core.compile(module, max_model_len=16, verify=True)
    (report,) = [each for each in compiled.plan.passes if each.name == "fusion.rotary"]
    assert report.matched == (way in WAYS), report.declined
    assert any(is_op(node, "ad_fusion::rotary") for node in compiled.graph.graph.nodes) == (way in WAYS)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), module(ids), rtol=1e-5, atol=allowed)


def test_angles_that_are_more_precise_than_the_row_are_left_alone():
    compiled = ad_core.compile(Rotated("float32 angles", torch.bfloat16), max_model_len=16)
    (report,) = [each for each in compiled.plan.passes if each.name == "fusion.rotary"]
    assert report.matched == 0
    assert "angles are of another dtype" in report.declined[0]
