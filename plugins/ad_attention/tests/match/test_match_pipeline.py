"""The matchers inside the core's capture, where weights of a checkpoint are on meta."""

from __future__ import annotations

import pytest

import ad_core


@pytest.mark.parametrize("name", ["gpt_neo", "bloom"])
def test_a_directory_whose_masks_are_buffers_or_computed(driver, tmp_path, name):
    model = driver.build(name)
    model.save_pretrained(tmp_path)
    compiled = ad_core.compile(tmp_path, dtype="float32")
    assert {claim.by for claim in compiled.plan.claims} == {"matcher attention.softmax"}
    assert len(compiled.plan.claims) == 4
    assert driver.worst_difference(compiled, driver.logits(model)) < 2e-5
