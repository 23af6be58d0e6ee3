"""The two common kinds of seams: what they reach, what they change while open, and that everything is put back."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from ad_core.api import Declined
from ad_core.graph.seams import ForwardSeam, MarkedFunctionSeam

LIBRARY = """
import torch
from torch import nn

def replaceable(mark, package):
    return lambda function: function

@replaceable("running_sum", "somewhere")
def add_up(x):
    return x.cumsum(1)

@replaceable("running_max", "somewhere")
def top_up(x):
    return x.cummax(1).values

class Sums(nn.Module):
    def forward(self, x):
        return add_up(x)

class Tops(nn.Module):
    def forward(self, x):
        return top_up(x)

class MoreSums(Sums):
    pass
"""


@pytest.fixture
def library(tmp_path: Path) -> Iterator[ModuleType]:
    path = tmp_path / "marked_library.py"
    path.write_text(LIBRARY)
    spec = importlib.util.spec_from_file_location("marked_library", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["marked_library"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["marked_library"]


class Doubled(MarkedFunctionSeam):
    name, produces, mark = "test.sums", "test::sum", "running_sum"

    def replacement(self, original: Callable[..., Any], entered: Callable[[str], None]) -> Callable[..., Any]:
        def doubled(x: torch.Tensor) -> torch.Tensor:
            entered(self.produces)
            return 2 * original(x)

        return doubled


class Negated(ForwardSeam):
    name, produces = "test.linear", "test::sum"

    def reaches(self, part: nn.Module) -> bool:
        return type(part).__name__ == "Tops"

    def forward(self, part: nn.Module, entered: Callable[[str], None]) -> Callable[..., Any]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            entered(self.produces)
            return -x

        return forward


def test_a_marked_function_is_swapped_while_the_seam_is_open(library):
    model, x, entered = nn.Sequential(library.MoreSums()), torch.ones(1, 3, 2), []
    original, expected = library.add_up, library.add_up(x)
    seam = Doubled()
    assert seam.applies(model) is None
    with seam.open(model, entered.append):
        torch.testing.assert_close(model(x), 2 * expected)
    assert entered == ["test::sum"]
    assert library.add_up is original
    torch.testing.assert_close(model(x), expected)


def test_a_model_whose_parts_do_not_call_it_is_declined(library):
    for model in (library.Tops(), nn.Linear(2, 2)):
        assert isinstance(Doubled().applies(model), Declined)


def test_everything_is_put_back_after_an_error(library):
    model, original = nn.Sequential(library.Sums(), library.Tops()), library.add_up
    with pytest.raises(RuntimeError, match="stop"), Doubled().open(model, print), Negated().open(model, print):
        raise RuntimeError("stop")
    assert library.add_up is original
    assert "forward" not in vars(model[1])


def test_a_forward_is_swapped_and_one_that_was_set_before_comes_back(library):
    model, x, entered = nn.Sequential(library.Tops(), library.Tops(), library.Sums()), torch.rand(1, 3, 2), []
    own = model[1].forward = lambda x: x + 1
    assert Negated().applies(model) is None
    with Negated().open(model, entered.append):
        torch.testing.assert_close(model(x), x.cumsum(1))
    assert entered == ["test::sum"] * 2
    assert "forward" not in vars(model[0])
    assert model[1].forward is own
    assert isinstance(Negated().applies(nn.Linear(2, 2)), Declined)


CALLERS = """
from torch import nn
from marked_library import add_up, add_up as total

def running_sum(x):
    return x.cumsum(1)

def other_sum(x):
    return x.cumsum(1)

class Imported(nn.Module):
    def forward(self, x):
        return add_up(x)

class Renamed(nn.Module):
    def forward(self, x):
        return total(x)

class Named(nn.Module):
    def forward(self, x):
        return running_sum(x)

class Unknown(nn.Module):
    def forward(self, x):
        return other_sum(x)
"""


@pytest.fixture
def callers(library: ModuleType) -> Iterator[ModuleType]:
    """A file of somebody's that knows the library, or at least its kernels' names."""
    callers = sys.modules["callers"] = ModuleType("callers")
    exec(CALLERS, vars(callers))  # a file without source: what was imported is still marked where it comes from
    yield callers
    del sys.modules["callers"]


@pytest.mark.parametrize("kind", ["Imported", "Renamed", "Named"])
def test_a_function_stands_for_the_kernel_where_it_is_imported_or_has_its_name(library, callers, kind):
    model, x, entered = getattr(callers, kind)(), torch.ones(1, 3, 2), []
    before, original = dict(vars(callers)), library.add_up
    expected = model(x)
    assert Doubled().applies(model) is None
    with Doubled().open(model, entered.append):
        torch.testing.assert_close(model(x), 2 * expected)
        assert library.add_up is original, "the library's own models are not this one"
    assert entered == ["test::sum"]
    assert vars(callers) == before


def test_a_function_of_another_name_stands_for_nothing(callers):
    assert isinstance(Doubled().applies(callers.Unknown()), Declined)
