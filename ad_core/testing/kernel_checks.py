"""Checks of a kernel: the cached op, driven step by step, against the canonical op over whole sequences in float64."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from ad_core.api import Declined, PagedTokens, Role
from ad_core.testing.calls import invoke
from ad_core.testing.cases import in_float64
from ad_core.testing.harness import Bound, Harness, Layout
from ad_core.testing.op_checks import agree
from ad_core.testing.poison import changed_rows, poisoned_empty, same_bits
from ad_core.testing.subject import Subject, dtype_of

Steps = list[list[tuple[int, int]]]


def cached_op(subject: Subject) -> None:
    """The cached op mutates the resources and nothing else by its schema; its fake agrees with it, padding included."""
    harness = subject.harness()
    arguments = harness.op._schema.arguments
    declared = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    missing = {name for name in harness.resources if name in {a.name for a in arguments}} - declared
    subject.equal(sorted(missing), [], "resources that the schema does not declare as mutable (Tensor(a!))")
    owned = set(harness.resources) | set(harness.buffers)
    optional = {a.name for a in arguments if isinstance(a.type, torch.OptionalType)}
    subject.equal(sorted(declared - owned - optional), [], "declared mutable, and neither resource nor buffer")
    assert subject.kernel is not None
    subject.equal(subject.kernel.target, subject.mixer.op._schema.name, "the kernel's target")
    agree(subject, harness.op, harness.bind([(0, 1), (1, 5)], pad_tokens=3, pad_sequences=1).arguments)
    agree(subject, harness.op, harness.bind([(0, 1)]).arguments)


def supports(subject: Subject) -> None:
    """`supports` answers with None or a reason, the same each time; a dtype that is accepted works."""
    assert subject.kernel is not None
    for name in sorted(subject.kernel.dtypes):
        dtype = dtype_of(name)
        answer = subject.declines(dtype)
        subject.equal(subject.declines(dtype), answer, "the second answer")
        if isinstance(answer, Declined):
            assert answer.reason.strip(), "declined without a reason"
            continue
        assert answer is None, f"supports must return None or Declined, not {answer!r}"
        harness = subject.harness(dtype=dtype, sequences=2, length=8)
        for result in harness.step([(0, 1), (1, 7)])[1]:
            if result.is_floating_point():
                subject.equal(result.dtype, dtype, "the result's dtype")
            assert bool(result.isfinite().all()), f"{name} is accepted and gives values that are not finite"


def float64(subject: Subject) -> None:
    """Prefill, a chunk and a decode in each dtype, within the case's tolerance of float64."""
    assert subject.kernel is not None
    for dtype in map(dtype_of, sorted(subject.kernel.dtypes)):
        if subject.declines(dtype):
            continue
        harness = subject.harness(dtype=dtype)
        expected = invoke(subject.mixer.op, in_float64(harness.data))
        for start, count in ((0, 13), (13, 9), (22, 1), (23, 1)):
            outputs = harness.step([(1, count)])[1]
            subject.close(
                outputs, [truth[1, start : start + count] for truth in expected], f"{dtype}, tokens {start} to {start + count}", dtype
            )


def prefill(subject: Subject) -> None:
    """A whole sequence in one step is what the canonical op gives; several at once too."""
    subject.follow(subject.harness(), [[(0, 24)]], "one sequence")
    subject.follow(subject.harness(), [[(0, 24), (1, 3), (2, 17)]], "three sequences")


def decode(subject: Subject) -> None:
    """Token by token from an empty cache, alone and together, is what one prefill gives."""
    subject.follow(subject.harness(sequences=1), [[(0, 1)]] * 24, "alone")
    together: Steps = [[(0, 9), (1, 2)], [(0, 1), (1, 1), (2, 1)], *[[(2, 1), (0, 1), (1, 1)]] * 14]
    subject.follow(subject.harness(), together, "together")


def chunks(subject: Subject) -> None:
    """Any way of cutting sequences into chunks gives the same."""
    for seed in range(4):
        steps = random_steps(random.Random(seed), sequences=1, length=24)
        subject.follow(subject.harness(seed=seed, sequences=1), steps, f"chunks {[count for [(_, count)] in steps]}")


def ragged(subject: Subject) -> None:
    """Decodes, fresh prompts and chunks with context in one step; batches that grow and shrink from step to step."""
    for seed in range(3):
        steps = random_steps(random.Random(100 + seed), sequences=4, length=24)
        subject.follow(subject.harness(seed=seed, sequences=4), steps, f"seed {seed}")


def strides(subject: Subject) -> None:
    """TOKEN arguments lie in memory as the model left them: heads before tokens, part of a wider tensor, or worse. So do PARAM arguments,
    which may be a view of what a checkpoint stores."""
    layouts: dict[str, Layout] = {
        "tokens next to each other": lambda tensor: tensor.transpose(1, -2).contiguous().transpose(1, -2),
        "the last dimension strided": lambda tensor: tensor.transpose(1, -1).contiguous().transpose(1, -1),
        "a slice of something wider": _part_of_wider,
    }
    for name, layout in layouts.items():
        steps: Steps = [[(0, 9), (1, 2)], [(0, 1), (1, 1)], [(1, 1), (0, 4), (2, 5)]]
        subject.follow(subject.harness(layout=layout), steps, name)
        subject.follow(subject.harness(layout=layout), [[(0, 9)], [(0, 1)]], f"{name}, one sequence")
    of_params: dict[str, Layout] = {
        "the first dimension the fastest": lambda tensor: tensor.movedim(0, -1).contiguous().movedim(-1, 0),
        "numbers apart": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
        "slices of something wider": _part_of_wider,
    }
    for name, layout in of_params.items() if Role.PARAM in subject.mixer.roles.values() else ():
        for steps in ([[(0, 5), (1, 1)], [(0, 1), (1, 1)]], [[(0, 9)], [(0, 1)]]):
            subject.follow(subject.harness(param_layout=layout), steps, f"PARAM arguments: {name}")


def _part_of_wider(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]


def page_boundary(subject: Subject) -> None:
    """Chunks that end just before, at and just after the end of a page, for pages of 1, 3 and 16 tokens."""
    for page_size in (1, 3, 16):
        for first in sorted({max(1, page_size - 1), page_size, page_size + 1}):
            steps: Steps = [[(0, first)], [(0, 1)], [(0, page_size)], [(0, 1), (1, page_size)]]
            used = 0
            kept = [step for step in steps if (used := used + step[0][1]) <= 40]
            subject.follow(subject.harness(page_size=page_size, length=40, sequences=2), kept, f"pages of {page_size}, first chunk {first}")


def permutation(subject: Subject) -> None:
    """Which pages and slots a sequence was given makes no difference."""
    steps = random_steps(random.Random(5), sequences=3, length=24)
    results = []
    for seed in (1, 2, 3):
        harness = subject.harness(seed=seed)
        results.append([harness.step(work) for work in steps])
    for other in results[1:]:
        for number, (one, two) in enumerate(zip(results[0], other, strict=True)):
            for index in one:
                subject.close(two[index], one[index], f"step {number}, sequence {index}, other pages and slots")


def padding(subject: Subject) -> None:
    """Tokens past the last sequence and sequences without tokens: zeros come out of a mixer, and live sequences do not notice."""
    for work in ([(0, 1)], [(0, 1), (1, 1), (2, 5)], [(0, 8), (1, 3)]):
        harness = subject.harness()
        expected = subject.expected(harness)
        for pads in ((3, 0), (0, 2), (4, 3)):
            starts = {index: harness.sequences[index].context for index, _ in work}
            bound = harness.bind(work, pad_tokens=pads[0], pad_sequences=pads[1])
            before = {name: pool.clone() for name, pool in harness.pools.items()}
            results = harness.run(bound)
            for result in results if subject.remembers else ():  # without memory a padded row is computed like any other, and not read
                subject.equal(
                    int(result[0, bound.num_tokens :].count_nonzero()), 0, f"values other than zero in padded rows, padding {pads}"
                )
            _only_own_rows(subject, harness, before, bound)
            for index, count in work:
                part = slice(starts[index], starts[index] + count)
                rows = tuple(result[0, bound.rows[index]] for result in results)
                subject.close(rows, [truth[index, part] for truth in expected], f"sequence {index} beside padding {pads}")
                harness.sequences[index].context += count


def mutation(subject: Subject) -> None:
    """Only resources change, and of them only the entries of the step's tokens and the states of its sequences. Without
    `append` nothing changes, and the result is the same."""
    for work in ([(0, 1), (1, 1)], [(0, 1), (1, 6), (2, 3)]):
        harness = subject.harness()
        harness.step([(0, 7), (1, 2)])
        bound = harness.bind(work)
        tensors = {name: value.clone() for name, value in bound.arguments.items() if isinstance(value, torch.Tensor)}
        addresses = {name: pool.data_ptr() for name, pool in harness.pools.items()}
        results = [result.clone() for result in harness.run(bound)]
        scratch = {a.name for a in harness.op._schema.arguments if a.alias_info is not None and a.name in harness.buffers}
        for name, value in bound.arguments.items():
            if name in tensors and name not in harness.pools and name not in scratch:
                subject.equal(same_bits(value, tensors[name]), True, f"{name} is as it was")
        subject.equal({name: pool.data_ptr() for name, pool in harness.pools.items()}, addresses, "addresses of the pools")
        before = {name: tensors[name] for name in harness.pools if name in tensors}
        _only_own_rows(subject, harness, before, bound)
        if "append" in bound.arguments and any(isinstance(resource, PagedTokens) for resource in harness.resources.values()):
            again = harness.bind(work, append=False)
            pools = {name: pool.clone() for name, pool in harness.pools.items()}
            reader = harness.run(again)
            subject.close(reader, results, "a call that shares the pages and does not append")
            for name, pool in harness.pools.items():
                subject.equal(same_bits(pool, pools[name]), True, f"{name} is as it was, without append")


def dirty_memory(subject: Subject) -> None:
    """Pages, slots and uninitialised memory hold what others left there. None of it comes through."""
    with poisoned_empty():
        harness = subject.harness(sequences=2)
        subject.follow(harness, [[(0, 24), (1, 11)], [(1, 1)]], "first owner")
        harness.release(0)
        harness.release(1)
        subject.follow(harness, [[(1, 5)], [(1, 1), (0, 3)], [(0, 1), (1, 1)], [(1, 1), (0, 17)]], "second owner")
        harness.release(0)
        subject.follow(harness, [[(0, 1)], [(0, 1), (1, 1)]], "third owner, one token")


def independence(subject: Subject) -> None:
    """The same step gives the same bits; and a sequence gives the same result alone and beside sequences full of NaN."""
    steps: Steps = [[(0, 5), (1, 9), (2, 2)], [(0, 1), (1, 1), (2, 6)], [(0, 1), (2, 1), (1, 1)]]
    first, second = (subject.harness() for _ in range(2))
    for number, work in enumerate(steps):
        one, two = first.step(work), second.step(work)
        for index in one:
            same = all(same_bits(a, b) for a, b in zip(one[index], two[index], strict=True))
            subject.equal(same, True, f"step {number}, sequence {index}: same bits the second time")
    beside = subject.harness()
    expected = subject.expected(beside)
    for name, value in beside.data.items():
        if isinstance(value, torch.Tensor) and subject.mixer.roles[name] == Role.TOKEN and value.is_floating_point():
            value[1:] = torch.nan
    context = 0
    for number, work in enumerate(steps):
        output, count = beside.step(work)[0], dict(work)[0]
        subject.close(output, [truth[0, context : context + count] for truth in expected], f"step {number} beside sequences of NaN")
        context += count


def window(subject: Subject) -> None:
    """Pages that the window has left are gone (0 in the page table, memory given to others), and nobody misses them."""
    for page_size in (1, 3):
        harness = subject.harness(page_size=page_size, length=24, sequences=2)
        subject.follow(harness, [[(0, 13), (1, 1)], *[[(0, 1), (1, 1)]] * 6, [(0, 4), (1, 5)], [(0, 1), (1, 12)]], f"pages of {page_size}")
        assert harness.freed_pages > 0, "no page ever left the window: the case's window is too long for 24 tokens"
        assert any(0 in sequence.pages for sequence in harness.sequences)
        subject.compared += 1


def random_steps(dice: random.Random, sequences: int, length: int) -> Steps:
    """Random chunks of random sequences until each has `length` tokens; single tokens are frequent."""
    left, steps = dict.fromkeys(range(sequences), length), []
    while left:
        chosen = dice.sample(sorted(left), dice.randint(1, len(left)))
        work = [(index, min(left[index], dice.choice((1, 1, 1, 2, 5, 9)))) for index in chosen]
        for index, count in work:
            left[index] -= count
            if not left[index]:
                del left[index]
        steps.append(work)
    return steps


def _only_own_rows(subject: Subject, harness: Harness, before: dict[str, torch.Tensor], bound: Bound) -> None:
    """Since `before`, only the entries of the step, and null pages and slots, have changed."""
    for name, old in before.items():
        if isinstance(harness.resources[name], PagedTokens):
            null = set(range(old.shape[1]))
            changed = changed_rows(old.flatten(0, 1), harness.pools[name].flatten(0, 1))
        else:
            null = {0}
            changed = changed_rows(old, harness.pools[name])
        subject.equal(sorted(changed - bound.entries[name] - null), [], f"entries of {name} that are not the step's and changed")


KERNEL_CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (
        cached_op,
        supports,
        float64,
        prefill,
        decode,
        chunks,
        ragged,
        strides,
        page_boundary,
        permutation,
        padding,
        mutation,
        dirty_memory,
        independence,
        window,
    )
}
