"""Where rounding to half precision hides whether a graph is its module, both are compared in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ad_core.capture import export_module
from ad_core.capture.verify import NumbersError, Reference, verify_numbers

WIDTH, VOCABULARY = 16, 40


class Steep(nn.Module):
    """What its linear layer rounds is a hundred times as large behind it."""

    def __init__(self, wide: bool = False, extra: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.wide, self.extra = wide, extra
        self.to(torch.bfloat16).requires_grad_(False).eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        if self.wide:
            y = F.linear(x.float(), self.layer.weight.float(), self.layer.bias.float())
            return self.head((100 * y).sin().to(torch.bfloat16) + self.extra)
        return self.head((100 * self.layer(x)).sin())


def compared(graph: nn.Module, module: nn.Module):
    return verify_numbers(export_module(graph).graph, Reference(module), torch.bfloat16, torch.device("cpu"))


def test_a_graph_that_rounds_less_than_its_module_is_its_module():
    agreement = compared(Steep(wide=True), Steep())
    assert agreement.widened == 3
    assert "at 3 of them in float32" in str(agreement)


def test_nothing_is_compared_in_float32_where_half_precision_agrees():
    assert compared(Steep(), Steep()).widened == 0


def test_what_the_graph_misses_shows_in_float32():
    with pytest.raises(NumbersError, match="differ from the module's"):
        compared(Steep(wide=True, extra=1e-2), Steep())


def test_a_module_that_cannot_be_copied_is_different():
    class Stubborn(Steep):
        def __deepcopy__(self, memo):
            raise TypeError("not this one")

    with pytest.raises(NumbersError, match="differ from the module's"):
        compared(Steep(wide=True), Stubborn())
