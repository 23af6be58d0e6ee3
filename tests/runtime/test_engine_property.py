"""Random load on random engines: every answer equals the recomputed one, every step's audit holds."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ad_core.api.errors import PromptTooLongError
from ad_core.runtime.params import SamplingParams

from .toy import ToyExecutor, reference

EOS = 5

engines = st.fixed_dictionaries(
    {
        "windows": st.sampled_from([(None,), (6,), (None, 5), (3, None, 9), ()]),
        "states": st.booleans(),
        "page_size": st.sampled_from([1, 2, 4]),
        "num_pages": st.integers(4, 24),
        "num_slots": st.integers(2, 12),
        "max_tokens": st.sampled_from([1, 2, 5, 16]),
        "max_sequences": st.integers(1, 5),
        "max_model_len": st.sampled_from([24, 60]),
        "vocab_size": st.just(12),
    }
)
requests = st.fixed_dictionaries(
    {
        "prompt": st.builds(
            lambda prefix, length, tail: [index % 3 for index in range(prefix, prefix + length)] + tail,
            st.integers(0, 1),
            st.integers(0, 20),
            st.lists(st.integers(0, 11), min_size=1, max_size=8),
        ),
        "temperature": st.sampled_from([0.0, 1.0]),
        "top_k": st.sampled_from([0, 4]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "max_tokens": st.integers(0, 14),
        "n": st.integers(1, 3),
        "arrives": st.integers(0, 12),
        "aborted": st.one_of(st.none(), st.none(), st.integers(0, 25)),
        "stream": st.booleans(),
    }
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(shape=engines, load=st.lists(requests, min_size=1, max_size=9), prefix=st.booleans(), interval=st.integers(1, 3))
def test_every_answer_equals_the_recomputed_one_and_every_audit_holds(shape, load, prefix, interval):
    shape["num_slots"] = max(shape["num_slots"], shape["max_sequences"] + 1)
    model = ToyExecutor(**shape)
    engine = model.engine(eos_token_ids=[EOS], prefix_cache=prefix, checkpoint_interval=interval * 4 * shape["page_size"])
    terminal: dict[str, object] = {}
    streamed: dict[str, list[list[int]]] = {}
    submitted = {}
    for step in range(2000):
        for index, request in enumerate(load):
            name = f"r{index}"
            if request["arrives"] == step:
                keys = ("temperature", "top_k", "repetition_penalty", "max_tokens", "n")
                params = SamplingParams(seed=index, **{key: request[key] for key in keys})
                try:
                    engine.submit(request["prompt"], params, name, stream=request["stream"])
                    submitted[name] = (request, params)
                except PromptTooLongError:
                    assert len(request["prompt"]) > engine.max_length
            if request["aborted"] == step:
                engine.abort(name)
        for output in engine.step():
            assert output.request_id not in terminal, "an output came behind the last one"
            tokens = streamed.setdefault(output.request_id, [[] for _ in output.outputs])
            for completion in output.outputs:
                assert completion.token_ids[: len(tokens[completion.index])] == tokens[completion.index]
                assert len(completion.token_ids) - len(tokens[completion.index]) == completion.num_new_tokens
                tokens[completion.index] = completion.token_ids
            if output.finished:
                terminal[output.request_id] = output
        engine.cache.audit()
        model.poison_free(engine)
        if not engine.has_work and step > 12:
            break
    assert terminal.keys() == submitted.keys()
    for name, (request, params) in submitted.items():
        for completion in terminal[name].outputs:
            expected = reference(model, request["prompt"], params, sample=completion.index, eos=[EOS], max_length=engine.max_length)
            if completion.finish_reason == "abort":
                assert request["aborted"] is not None
                assert completion.token_ids == expected[: len(completion.token_ids)]
            else:
                assert completion.token_ids == expected
                assert completion.finish_reason == ("stop" if expected[-1:] == [EOS] else "length")
    assert all(allocator.num_owned == 0 for allocator in [*engine.cache.groups, engine.cache.slots.units])
    assert len(engine.scheduler._lanes) == shape["max_sequences"]
