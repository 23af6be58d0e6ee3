"""The marked function while the seam is open: what it computes, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from ad_conv.match.hf_seam import MarkedConvSeam
from ad_core.api.errors import CaptureError

mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")


def replaced(entered: list[str]):  # type: ignore[no-untyped-def]
    return MarkedConvSeam().replacement(mamba.causal_conv1d_fn, entered.append)


@pytest.mark.parametrize("activation", [None, "silu", "swish", "gelu", "relu"])
def test_it_computes_what_the_marked_function_computes(activation: str | None) -> None:
    x, weight, bias, entered = torch.randn(2, 6, 9), torch.randn(6, 4), torch.randn(6), list[str]()
    result = replaced(entered)(x, weight, bias, activation=activation, use_cache=False)
    torch.testing.assert_close(result, mamba.causal_conv1d_fn(x, weight, bias, activation=activation), rtol=1e-5, atol=1e-5)
    assert entered == ["ad_conv::causal_conv1d"]


@pytest.mark.parametrize(
    "given", [{"seq_idx": torch.zeros(1, 3)}, {"initial_states": torch.zeros(1)}, {"return_final_states": True}], ids=str
)
def test_calls_with_states_are_refused(given: dict[str, object]) -> None:
    entered: list[str] = []
    with pytest.raises(CaptureError):
        replaced(entered)(torch.randn(1, 6, 3), torch.randn(6, 4), **given)
    assert entered == []


def test_the_function_is_put_back() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4, time_step_rank=2))
    original, seam = mamba.causal_conv1d_fn, MarkedConvSeam()
    assert seam.applies(model) is None
    with seam.open(model, lambda op: None):
        assert mamba.causal_conv1d_fn is not original
    assert mamba.causal_conv1d_fn is original
    assert seam.applies(torch.nn.Linear(2, 2)) is not None
