"""A tiny model on disk and an engine that serves it, for everything that is about neither."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ad_core import LLM

from ..zoo_models import tiny

OPTIONS = {"max_batch_tokens": 32, "page_size": 4, "max_requests": 8}
"""Of every small engine here."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in transformers' form, without a tokenizer. Not to be changed."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    tiny("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def shared(folder: Path) -> Iterator[LLM]:
    """An engine for tests that leave nothing behind. Its cache holds 496 tokens; the model takes 128."""
    with LLM(folder, memory="256KiB", max_queued_requests=16, **OPTIONS) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The shared engine; afterwards nothing may be owned, every page must be accounted for, and it must still answer."""
    yield shared
    cache = shared._engine.cache
    assert len(shared.generate([5, 6, 7])[0].outputs[0].token_ids) > 0
    cache.audit()
    assert [group.num_owned for group in cache.groups] == [0]
    assert shared._engine.num_waiting == shared._engine.num_running == 0
