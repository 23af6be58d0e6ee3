"""Checks of the canonical op: it must be an honest, causal, whole-sequence truth before any kernel is held to it."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ad_core.api import Role
from ad_core.testing.calls import invoke, symbolic_arguments
from ad_core.testing.cases import in_float64, map_tensors
from ad_core.testing.subject import Subject, dtype_of

HALVES = ("float32", "bfloat16", "float16")


def schema(subject: Subject) -> None:
    """Every argument has a role, TOKEN arguments and results agree in batch and length, nothing is mutated or aliased."""
    op, roles = subject.mixer.op, subject.mixer.roles
    subject.equal(set(roles), {argument.name for argument in op._schema.arguments}, "roles name the schema's arguments")
    subject.equal([a.name for a in op._schema.arguments if a.alias_info], [], "a canonical op mutates nothing")
    arguments = subject.arguments(2, 5)
    subject.equal(sorted(set(arguments) - set(roles)), [], "the case gives arguments that the schema does not have")
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and roles[name] == Role.TOKEN:
            subject.equal(tuple(value.shape[:2]), (2, 5), f"{name} is a TOKEN argument [B, S, ...]")
    _opcheck(subject, op, arguments)
    for result in invoke(op, arguments):
        subject.equal(tuple(result.shape[:2]), (2, 5), "results are [B, S, ...]")


def fake(subject: Subject) -> None:
    """The fake tells shape, strides, dtype and device exactly, at any size, and keeps batch and length symbolic."""
    op = subject.mixer.op
    for dtype in map(dtype_of, HALVES):
        for batch, length in ((1, 1), (2, 5), (3, 7)):
            arguments = subject.arguments(batch, length, dtype)
            agree(subject, op, arguments)
    symbolic = symbolic_arguments(subject.mixer.roles, subject.arguments(3, 7))
    mode = next(value.fake_mode for value in symbolic.values() if isinstance(value, FakeTensor))
    with mode:
        results = invoke(op, symbolic)
    assert mode.shape_env is not None
    guards = [str(guard.expr) for guard in mode.shape_env.guards]
    subject.equal(guards, [], "the fake looked at sizes that are symbolic")
    for result in results:
        for axis, extent in ((0, 3), (1, 7)):
            size = result.shape[axis]
            assert isinstance(size, torch.SymInt), f"dimension {axis} of the fake result is the number {size}, not a symbol"
            subject.equal(size.node.hint, extent, f"dimension {axis} of the fake result")


def causality(subject: Subject) -> None:
    """Tokens from t on may change; what the op gives before t may not."""
    arguments = subject.arguments(2, 13)
    before = invoke(subject.mixer.op, arguments)
    for cut in (1, 4, 9, 12):
        changed = dict(arguments)
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and subject.mixer.roles[name] == Role.TOKEN and value.is_floating_point():
                changed[name] = value.clone()
                changed[name][:, cut:] = 3 * value[:, cut:].flip(1) + 1
        after = invoke(subject.mixer.op, changed)
        subject.close(tuple(x[:, :cut] for x in after), [x[:, :cut] for x in before], f"tokens before {cut} after a change from there on")


def tokens_apart(subject: Subject) -> None:
    """Of an op without memory: what a token gets depends on that token alone. In another order, or among others, it gets the same."""
    arguments = subject.arguments(2, 13)
    results = invoke(subject.mixer.op, arguments)

    def chosen(order: torch.Tensor) -> dict[str, Any]:
        roles = subject.mixer.roles
        return {
            name: value[:, order] if isinstance(value, torch.Tensor) and roles[name] == Role.TOKEN else value
            for name, value in arguments.items()
        }

    orders = {"in reverse": torch.arange(12, -1, -1), "repeated": torch.tensor([3, 3, 8]), "one alone": torch.tensor([5])}
    for name, order in orders.items():
        subject.close(invoke(subject.mixer.op, chosen(order)), [result[:, order] for result in results], f"tokens {name}")


def float64(subject: Subject) -> None:
    """Each dtype is as close to float64 as it can be expected to be; and float64 is float64, or it would be no oracle."""
    exact = in_float64(subject.arguments(2, 24))
    nudged = map_tensors(lambda tensor: tensor * (1 + 2**-30) if tensor.is_floating_point() else tensor, exact)
    for one, two in zip(invoke(subject.mixer.op, exact), invoke(subject.mixer.op, nudged), strict=True):
        if not one.is_floating_point():  # a choice, say, which has no precision
            continue
        subject.equal(
            torch.equal(one, two), False, "float64 arguments that differ by 1e-9 give equal results, as if computed in lower precision"
        )
    for dtype in map(dtype_of, HALVES):
        arguments = subject.arguments(2, 24, dtype)
        results = invoke(subject.mixer.op, arguments)
        subject.equal({result.dtype for result in results if result.is_floating_point()} - {dtype}, set(), "other dtypes of results")
        subject.close(results, invoke(subject.mixer.op, in_float64(arguments)), f"{dtype} against float64", dtype)


def agree(subject: Subject, op: Any, arguments: dict[str, Any]) -> None:
    """The op on fake tensors says what it does on real ones."""
    with FakeTensorMode() as mode:
        fakes = invoke(op, map_tensors(mode.from_tensor, arguments))
    real = invoke(op, arguments)
    describe = [(tuple(x.shape), x.stride(), x.dtype, x.device) for x in real]
    subject.equal(
        [(tuple(x.shape), x.stride(), x.dtype, x.device) for x in fakes], describe, "shape, strides, dtype and device of the fake"
    )


def _opcheck(subject: Subject, op: Any, arguments: dict[str, Any]) -> None:
    """PyTorch's own check that the schema tells the truth about mutation and aliasing."""
    args, kwargs = [], {}
    for argument in op._schema.arguments:
        value = arguments.get(argument.name, argument.default_value if argument.has_default_value() else None)
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    torch.library.opcheck(op, tuple(args), kwargs, test_utils=("test_schema",))
    subject.compared += 1
