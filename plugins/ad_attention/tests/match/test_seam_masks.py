"""What transformers' mask functions mean: every description is held against the mask that transformers itself would build.

These tests also pin the names inside `transformers.masking_utils` that the descriptions are read from.
"""

from __future__ import annotations

import pytest
import torch
import transformers.masking_utils as masks

from ad_attention.match.hf_masks import MaskDescription, describe_mask
from ad_attention.match.mask_classifier import MaskKind

LENGTH = 23
NO_PADDING = torch.zeros(2, dtype=torch.int64)
POSITIONS = torch.arange(LENGTH).expand(2, -1)


def packed(function):
    same = masks.packed_sequence_mask_function(torch.zeros(2, LENGTH, dtype=torch.int64))
    return masks.and_masks(masks.remap_positions_for_packed_sequence(function, POSITIONS), same)


KNOWN = {
    "causal": (masks.causal_mask_function, None, None),
    "window": (masks.sliding_window_causal_mask_function(5), 5, None),
    "chunk": (masks.chunked_causal_mask_function(4, NO_PADDING), None, 4),
    "packed causal": (packed(masks.causal_mask_function), None, None),
    "packed window": (packed(masks.sliding_window_causal_mask_function(5)), 5, None),
    "window twice": (masks.and_masks(masks.sliding_window_causal_mask_function(5), masks.sliding_window_overlay(3)), 3, None),
}

UNKNOWN = {
    "bidirectional": (masks.bidirectional_mask_function, "not causal"),
    "bidirectional window": (masks.sliding_window_bidirectional_mask_function(5), "sliding_window_bidirectional_overlay"),
    "window alone": (masks.sliding_window_overlay(5), "not causal"),
    "or": (masks.or_masks(masks.causal_mask_function, masks.blockwise_overlay(POSITIONS)), "or_masks"),
    "blocks": (masks.and_masks(masks.causal_mask_function, masks.blockwise_overlay(POSITIONS)), "blockwise_overlay"),
    "padding": (masks.and_masks(masks.causal_mask_function, masks.padding_mask_function(POSITIONS)), "padding_mask_function"),
    "two chunks": (
        masks.and_masks(masks.chunked_causal_mask_function(4, NO_PADDING), masks.chunked_overlay(6, NO_PADDING)),
        "chunks of 4 and 6",
    ),
    "offsets": (masks.add_offsets_to_mask_function(masks.causal_mask_function, 3, 0), "add_offsets_to_mask_function"),
    "the model's own": (lambda b, h, q, k: k <= q, "the model's own"),
}


@pytest.mark.parametrize(("function", "window", "chunk"), KNOWN.values(), ids=KNOWN.keys())
def test_known_masks_mean_what_transformers_builds(function, window, chunk):
    described = describe_mask(2, LENGTH, LENGTH, mask_function=function)
    assert (described.window, described.chunk, described.problem) == (window, chunk, None)
    built = masks.sdpa_mask(2, LENGTH, LENGTH, mask_function=function, allow_is_causal_skip=False)
    allowed = MaskKind(described.window, described.chunk).allowed(LENGTH)
    assert torch.equal(allowed.expand(2, 1, -1, -1), built)


@pytest.mark.parametrize(("function", "problem"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_other_masks_are_described_by_their_problem(function, problem):
    assert problem in describe_mask(2, LENGTH, LENGTH, mask_function=function).problem


def test_a_cache_and_a_padding_mask_are_problems_and_a_mask_of_ones_is_none():
    assert "cache" in describe_mask(2, 1, LENGTH, q_offset=LENGTH - 1).problem
    padded = torch.ones(2, LENGTH, dtype=torch.bool)
    assert describe_mask(2, LENGTH, LENGTH, attention_mask=padded).problem is None
    padded[0, 0] = False
    assert "padding" in describe_mask(2, LENGTH, LENGTH, attention_mask=padded).problem


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: mask + 1,
        lambda mask: 1.0 - mask,
        lambda mask: torch.ones(2) + mask,
        lambda mask: mask[:, :, :4],
        lambda mask: mask == 0,
        lambda mask: ~mask,
        lambda mask: bool(mask),
        lambda mask: len(mask),
        lambda mask: torch.where(mask, 1.0, 0.0),
    ],
)
def test_computing_on_a_description_is_a_type_error(use):
    with pytest.raises(TypeError):
        use(MaskDescription())


@pytest.mark.parametrize("name", ["dtype", "shape", "bool", "expand", "device"])
def test_reading_a_description_is_an_attribute_error_that_says_why(name):
    with pytest.raises(AttributeError, match=f"{name}.*only a description"):
        getattr(MaskDescription(), name)


def test_a_description_may_be_moved_and_handed_on():
    mask = MaskDescription(window=3)
    assert mask.to("cuda", torch.float32) is mask
    assert {"sliding": mask}["sliding"] is mask


@pytest.mark.parametrize("window", [None, 3])
def test_a_part_of_the_mask_is_the_real_thing(window):
    part = MaskDescription(window=window, at=(7, None))[:, 0, 2:4]
    steps = torch.arange(7)
    distance = steps[2:4, None] - steps
    assert torch.equal(part, ((distance >= 0) & (distance < (window or 7)))[None])


def test_there_is_no_part_of_a_mask_that_is_not_known():
    with pytest.raises(TypeError, match="not causal"):
        MaskDescription(problem="it is not causal", at=(7, None))[:, 0]
