"""The pass that finds latent attention: by where numbers come from, whatever moves them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ad_attention.latent.rewrite import FindLatent
from ad_attention.op import attention  # noqa: F401  (defines the op)
from ad_attention.plugin import ad_mixers
from ad_core.api import PassContext
from ad_core.graph.edit import flat_module
from ad_core.graph.ops import qualified_name

HEADS, NOPE, ROPE, VALUE, WIDTH, HIDDEN = 4, 6, 4, 8, 10, 24


class Latent(nn.Module):
    """Attention whose keys and values come from a latent; subclasses spell it, or break it, in `heads`."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, HEADS * (NOPE + ROPE), bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH + ROPE, bias=False)
        self.up = nn.Linear(WIDTH, HEADS * (NOPE + VALUE), bias=False)
        self.modifiers: dict = {}

    def heads(self, up: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nope, value = up.unflatten(2, (HEADS, -1)).split([NOPE, VALUE], -1)
        return torch.cat([nope, rope[:, :, None].expand(-1, -1, HEADS, -1)], -1), value

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        latent, rope = self.down(hidden).split([WIDTH, ROPE], -1)
        key, value = self.heads(self.up(latent), rope.sin())
        query = self.query(hidden).unflatten(2, (HEADS, -1))
        return torch.ops.ad_attention.attention(query, key, value, scale=0.3, **self.modifiers)


class RopeFirst(Latent):
    def heads(self, up, rope):
        nope, value = up.unflatten(2, (HEADS, -1)).split([NOPE, VALUE], -1)
        return torch.cat([rope[:, :, None].expand(-1, -1, HEADS, -1), nope], -1), value


class FilledInPlace(Latent):
    def heads(self, up, rope):
        by_head = up.view(up.shape[0], -1, HEADS, NOPE + VALUE).transpose(1, 2)
        key = up.new_zeros(up.shape[0], HEADS, up.shape[1], NOPE + ROPE)
        key = torch.slice_scatter(key, by_head[..., :NOPE], 3, 0, NOPE)
        key = torch.slice_scatter(key, rope[:, None].expand(-1, HEADS, -1, -1), 3, NOPE)
        return key.transpose(1, 2), by_head[..., NOPE:].transpose(1, 2)


class Paired(Latent):
    """The shared part is made in pairs, as a complex product would."""

    def heads(self, up, rope):
        pairs = rope[:, None].unflatten(-1, (-1, 2)) * 1.5
        key, value = super().heads(up, pairs.flatten(3)[:, 0])
        return key, value


class HeadsLast(Latent):
    """The columns of the linear are features by heads, so its rows do not lie head by head."""

    def heads(self, up, rope):
        nope, value = up.unflatten(2, (-1, HEADS)).transpose(2, 3).split([NOPE, VALUE], -1)
        return torch.cat([nope, rope[:, :, None].expand(-1, -1, HEADS, -1)], -1), value


class Scaled(Latent):
    def heads(self, up, rope):
        key, value = super().heads(up, rope)
        return key * 2, value


class OtherTokens(Latent):
    def heads(self, up, rope):
        key, value = super().heads(up, rope)
        return key.flip(1), value


def captured(model: nn.Module) -> torch.fx.GraphModule:
    ad_mixers()
    torch.manual_seed(0)
    shapes = {"hidden": {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=1, max=512)}}
    program = torch.export.export(model.eval(), (torch.randn(2, 12, HIDDEN),), dynamic_shapes=shapes, strict=False)
    return flat_module(program.module())


def run(graph: torch.fx.GraphModule):
    return FindLatent().run(graph, PassContext(torch.device("cpu"), torch.float32))


def ops(graph: torch.fx.GraphModule) -> list[str]:
    return [name for node in graph.graph.nodes if (name := qualified_name(node.target)).startswith("ad_attention")]


@pytest.mark.parametrize("kind", [Latent, RopeFirst, FilledInPlace, Paired])
@pytest.mark.parametrize("modifiers", [{}, {"window": 4}], ids=["plain", "window"])
def test_every_spelling_becomes_one_op_with_the_same_values(kind, modifiers):
    model = kind()
    model.modifiers = modifiers
    graph = captured(model)
    report = run(graph)
    graph.recompile()
    assert (report.matched, report.declined, ops(graph)) == (1, [], ["ad_attention::mla"])
    hidden = torch.randn(3, 21, HIDDEN)
    torch.testing.assert_close(graph(hidden)[0], model(hidden), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "modifiers", "reason"),
    [
        (HeadsLast, {}, "head by head"),
        (Scaled, {}, "its value comes from"),
        (OtherTokens, {}, "its value comes from"),
        (Latent, {"softcap": 2.0}, "it has softcap"),
    ],
)
def test_what_is_not_latent_attention_stays_and_says_why(kind, modifiers, reason):
    model = kind()
    model.modifiers = modifiers
    graph = captured(model)
    report = run(graph)
    assert ops(graph) == ["ad_attention::attention"]
    assert report.matched == 0
    assert reason in report.declined[0]
