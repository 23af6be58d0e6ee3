"""What may be asked, and how a refusal reads."""

from __future__ import annotations

import pytest

from ad_core.api.errors import InvalidRequestError
from ad_core.runtime.params import SamplingParams


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "`temperature` is -0.1"),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"temperature": "hot"}, "`temperature` is 'hot'"),
        ({"temperature": None}, "`temperature` is None"),
        ({"top_k": -1}, "`top_k` is -1"),
        ({"top_k": 2.5}, "`top_k` is 2.5"),
        ({"top_p": 0.0}, "`top_p` is 0.0"),
        ({"top_p": 1.1}, "`top_p` is 1.1"),
        ({"min_p": 1.5}, "`min_p` is 1.5"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` is 0.0"),
        ({"presence_penalty": float("inf")}, "`presence_penalty` is inf"),
        ({"frequency_penalty": "x"}, "`frequency_penalty` is 'x'"),
        ({"seed": 2**64}, "`seed` is"),
        ({"stop": ""}, "`stop.0` is ''"),
        ({"stop": ["a", 3]}, "`stop.1` is 3"),
        ({"stop": ["a"] * 65}, "`stop` is"),
        ({"stop_token_ids": [-4]}, "`stop_token_ids.0` is -4"),
        ({"logprobs": -1}, "`logprobs` is -1"),
        ({"n": 0}, "`n` is 0"),
        ({"n": 10_000}, "`n` is 10000"),
        ({"max_tokens": -1}, "`max_tokens` is -1"),
        ({"max_tokens": True}, "`max_tokens` is True"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens 5 is more than max_tokens 4"),
        ({"tempreature": 1.0}, "unknown sampling parameter `tempreature`"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(values, message):
    with pytest.raises(InvalidRequestError) as refusal:
        SamplingParams(**values)
    assert message in str(refusal.value)
    assert len(str(refusal.value)) < 800


def test_a_typo_is_answered_with_the_nearest_name():
    with pytest.raises(InvalidRequestError, match="did you mean `temperature`"):
        SamplingParams(tempreature=1.0)


def test_one_stop_string_needs_no_list_and_tuples_will_do():
    assert SamplingParams(stop="x").stop == ["x"]
    assert SamplingParams(stop=("x", "y"), stop_token_ids=(3,)).stop_token_ids == [3]
    assert SamplingParams(stop=None).stop == []


def test_validation_from_json_refuses_with_the_same_error():
    with pytest.raises(InvalidRequestError, match="top_p"):
        SamplingParams.model_validate_json('{"top_p": 7}')


def test_parameters_cannot_be_changed_behind_the_engines_back():
    with pytest.raises(Exception, match="frozen"):
        SamplingParams().temperature = 3.0
