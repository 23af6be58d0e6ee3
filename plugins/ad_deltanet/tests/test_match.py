"""The seam reads a call by the names and defaults of the function that is called."""

from __future__ import annotations

import pytest
import torch

from ad_core.api.errors import CaptureError
from ad_deltanet.match import ChunkGatedDelta
from ad_deltanet.op import gated_delta


def library(query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, **rest):
    """As transformers has it."""


def fla(
    q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, cu_seqlens=None
):
    """As the kernel's own library has it."""


def own(q, k, v, g, beta, scale=0.5):
    """Somebody's, with a scale of its own."""


def call(function, *args, **kwargs):
    return ChunkGatedDelta().replacement(function, lambda op: None)(*args, **kwargs)[0]


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 2, 4) for _ in range(3))
    return q, k, v, -torch.rand(1, 5, 2), torch.rand(1, 5, 2)


@pytest.mark.parametrize(
    ("function", "more", "scale"),
    [(library, (32,), 0.5), (fla, (), 0.5), (fla, (0.3,), 0.3), (own, (), 0.5), (own, (2.0,), 2.0)],
)
def test_arguments_mean_what_the_function_says(function, more, scale, tensors):
    torch.testing.assert_close(call(function, *tensors, *more), gated_delta(*tensors, scale=scale))


def test_names_of_both_libraries_are_known(tensors):
    q, k, v, g, beta = tensors
    expected = gated_delta(q, k, v, g, beta, scale=0.5, l2norm=True)
    torch.testing.assert_close(call(fla, q=q, k=k, v=v, g=g, beta=beta, use_qk_l2norm_in_kernel=True), expected)
    torch.testing.assert_close(call(library, query=q, key=k, value=v, g=g, beta=beta, use_qk_l2norm_in_kernel=True), expected)


@pytest.mark.parametrize("given", [{"initial_state": torch.zeros(1)}, {"output_final_state": True}, {"cu_seqlens": torch.tensor([0, 5])}])
def test_a_call_with_states_or_packed_sequences_is_refused(given, tensors):
    with pytest.raises(CaptureError, match="chunk_gated_delta_rule"):
        call(fla, *tensors, **given)
