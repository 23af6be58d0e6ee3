"""Each check of the kit catches a planted bug. A mutant is a toy mixer or kernel with one thing wrong."""

import itertools

import torch

from ad_core.api import Declined, SlotState
from ad_core.graph.ops import define_op
from ad_core.testing import run_checks
from ad_core.testing.toys import (
    EMA_CASES,
    RECALL_CASES,
    RECALL_PAGED,
    Ema,
    EmaSlots,
    Recall,
    RecallPaged,
    ema_reference,
    ema_slots,
    recall_paged,
)

NUMBERS = itertools.count()
EMA_SLOTS = "(Tensor x, Tensor decay, Tensor(a!) state, Tensor cu_seqlens, Tensor state_slots, Tensor fresh) -> Tensor"


def like(x, *_):
    return torch.empty_like(x)


def ema_kernel(function, schema=EMA_SLOTS, fake=like, **attributes):
    """The kernel of the toy recurrence with another body, schema, fake or attribute."""
    name = f"mutant::ema_{next(NUMBERS)}"
    define_op(name + schema, function, fake)
    return type("Mutant", (EmaSlots,), {"op": name, **attributes})()


def recall_kernel(function, schema=RECALL_PAGED, fake=like, **attributes):
    """The same for the toy with pages."""
    name = f"mutant::recall_{next(NUMBERS)}"
    define_op(name + schema, function, fake)
    return type("Mutant", (RecallPaged,), {"op": name, **attributes})()


def canonical(base, schema, function, fake=like):
    """The mixer with another canonical op, and no kernels: its own checks are what counts."""
    op = define_op(f"mutant::op_{next(NUMBERS)}{schema}", function, fake)
    return type("Mutant", (base,), {"op": op, "kernels": ()})()


def red_ema(kernel):
    return run_checks(Ema(), EMA_CASES, [kernel]).red


def red_recall(kernel, cases=RECALL_CASES):
    return run_checks(Recall(), cases, [kernel]).red


def test_the_toys_themselves_are_green():
    assert red_ema(EmaSlots()) == set()
    assert red_recall(RecallPaged()) == set()


# -- the canonical op -------------------------------------------------------------------------------------------------

EMA = "(Tensor x, Tensor decay) -> Tensor"


def red_op(mixer, cases=EMA_CASES):
    return run_checks(mixer, cases).red


def test_an_op_that_looks_ahead():
    assert red_op(canonical(Ema, EMA, lambda x, decay: ema_reference(x, decay) + x.roll(-1, 1))) == {"op_causality"}


def test_an_op_whose_fake_has_another_dtype():
    assert red_op(canonical(Ema, EMA, ema_reference, lambda x, decay: x.new_empty(x.shape, dtype=torch.float32))) == {"op_fake"}


def test_an_op_whose_fake_has_other_strides():
    wrong = lambda x, decay: x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)  # noqa: E731
    assert red_op(canonical(Ema, EMA, ema_reference, wrong)) == {"op_fake"}


def test_an_op_whose_fake_fixes_the_length():
    assert red_op(canonical(Ema, EMA, ema_reference, lambda x, decay: x.new_empty(x.shape[0], int(x.shape[1]), x.shape[2]))) == {"op_fake"}


def test_an_op_that_loses_precision():
    def coarse(x, decay):
        return ema_reference(x.half(), decay.half()).to(x.dtype) if x.dtype == torch.float32 else ema_reference(x, decay)

    assert red_op(canonical(Ema, EMA, coarse)) == {"op_float64"}


def test_an_op_whose_float64_is_not():
    narrow = lambda x, decay: ema_reference(x.float(), decay.float()).to(x.dtype)  # noqa: E731
    assert red_op(canonical(Ema, EMA, narrow)) == {"op_float64"}


def test_an_op_that_writes_to_its_input_in_secret():
    def writes(x, decay):
        out = ema_reference(x, decay)
        x.zero_()
        return out

    assert "op_schema" in red_op(canonical(Ema, EMA, writes))


def test_an_op_that_returns_its_input():
    assert "op_schema" in red_op(canonical(Recall, "(Tensor x, int? window=None) -> Tensor", lambda x, window=None: x), RECALL_CASES)


def test_roles_that_forget_an_argument():
    mixer = canonical(Ema, EMA, ema_reference)
    mixer.roles = {"x": mixer.roles["x"]}
    assert "op_schema" in red_op(mixer)


# -- a kernel with a state --------------------------------------------------------------------------------------------


def test_a_state_that_is_not_reset_when_a_sequence_is_fresh():
    def dirty(x, decay, state, cu_seqlens, state_slots, fresh):
        return ema_slots(x, decay, state, cu_seqlens, state_slots, torch.zeros_like(fresh))

    assert {"dirty_memory", "prefill"} <= red_ema(ema_kernel(dirty))


def test_a_state_that_is_reset_only_while_its_slot_is_new():
    """Finds pools zeroed, as an engine leaves them at its start, and never again: only a second owner notices."""

    def once(x, decay, state, cu_seqlens, state_slots, fresh):
        state.nan_to_num_(0)
        return ema_slots(x, decay, state, cu_seqlens, state_slots, torch.zeros_like(fresh))

    assert red_ema(ema_kernel(once)) == {"dirty_memory", "padding"}


def test_a_state_that_is_always_reset():
    def forgets(x, decay, state, cu_seqlens, state_slots, fresh):
        return ema_slots(x, decay, state, cu_seqlens, state_slots, torch.ones_like(fresh))

    red = red_ema(ema_kernel(forgets))
    assert {"decode", "chunks", "float64"} <= red
    assert "prefill" not in red


def test_slots_that_are_ignored():
    def by_row(x, decay, state, cu_seqlens, state_slots, fresh):
        return ema_slots(x, decay, state, cu_seqlens, torch.arange(1, len(state_slots) + 1), fresh)

    assert {"ragged", "mutation"} <= red_ema(ema_kernel(by_row))


def test_a_state_kept_in_half_precision():
    class Coarse(Ema):
        def resources(self, call, options):
            return {"state": SlotState((6,), torch.float16)}

    def rounds(x, decay, state, cu_seqlens, state_slots, fresh):
        wide = state.to(torch.float32)
        out = ema_slots(x, decay, wide, cu_seqlens, state_slots, fresh)
        state.copy_(wide)
        return out

    assert {"decode", "chunks"} <= run_checks(Coarse(), EMA_CASES, [ema_kernel(rounds)]).red


def test_one_sequence_where_there_are_several():
    def not_ragged(x, decay, state, cu_seqlens, state_slots, fresh):
        return ema_slots(x, decay, state, torch.tensor([0, x.shape[1]]), state_slots[:1], fresh[:1])

    red = red_ema(ema_kernel(not_ragged))
    assert {"ragged", "prefill", "padding", "independence"} <= red
    assert "chunks" not in red  # a single sequence does not notice


def test_padded_rows_that_are_not_zero():
    def leaks(x, decay, state, cu_seqlens, state_slots, fresh):
        out = ema_slots(x, decay, state, cu_seqlens, state_slots, fresh)
        out[:, int(cu_seqlens[-1]) :] = x[:, int(cu_seqlens[-1]) :]
        return out

    assert red_ema(ema_kernel(leaks)) == {"padding"}


def test_padded_rows_that_are_left_uninitialised():
    def leaves(x, decay, state, cu_seqlens, state_slots, fresh):
        out = torch.full_like(x, 7)
        tokens = int(cu_seqlens[-1])
        out[:, :tokens] = ema_slots(x, decay, state, cu_seqlens, state_slots, fresh)[:, :tokens]
        return out

    assert red_ema(ema_kernel(leaves)) == {"padding"}


def test_padded_sequences_that_write_to_a_slot():
    def writes(x, decay, state, cu_seqlens, state_slots, fresh):
        out = ema_slots(x, decay, state, cu_seqlens, state_slots, fresh)
        state[state_slots[cu_seqlens.diff() == 0] - 1] = 0  # -1 of the null slot is the last one
        return out

    assert red_ema(ema_kernel(writes)) == {"padding"}


def test_a_mutation_that_the_schema_does_not_declare():
    assert "cached_op" in red_ema(ema_kernel(ema_slots, EMA_SLOTS.replace("Tensor(a!)", "Tensor")))


def test_an_input_that_is_written():
    def writes(x, decay, state, cu_seqlens, state_slots, fresh):
        out = ema_slots(x, decay, state, cu_seqlens, state_slots, fresh)
        x.zero_()
        return out

    assert "mutation" in red_ema(ema_kernel(writes))


def test_a_result_that_differs_from_run_to_run():
    def noisy(x, decay, state, cu_seqlens, state_slots, fresh):
        out = ema_slots(x, decay, state, cu_seqlens, state_slots, fresh)
        return out * (1 + 1e-6 * torch.rand(()).to(out.dtype))

    assert red_ema(ema_kernel(noisy)) == {"independence"}


def test_a_result_that_depends_on_batch_mates():
    def mates(x, decay, state, cu_seqlens, state_slots, fresh):
        out = ema_slots(x, decay, state, cu_seqlens, state_slots, fresh)
        return out + 0 * x.sum()

    assert red_ema(ema_kernel(mates)) == {"independence"}


def test_inputs_that_are_taken_to_be_contiguous():
    def flat(x, *rest):
        return ema_slots(x.as_strided(x.shape, (x[0].numel(), x.shape[2], 1)), *rest)

    assert red_ema(ema_kernel(flat)) == {"strides"}


def test_weights_that_are_taken_to_be_contiguous():
    def flat(x, decay, *rest):
        return ema_slots(x, decay.as_strided(decay.shape, (1,)), *rest)

    assert red_ema(ema_kernel(flat)) == {"strides"}


def test_uninitialised_memory_that_is_read():
    def reads(x, decay, state, cu_seqlens, state_slots, fresh):
        return ema_slots(x, decay, state, cu_seqlens, state_slots, fresh) + 0 * torch.empty_like(x)

    assert "dirty_memory" in red_ema(ema_kernel(reads))


def test_a_dtype_that_is_claimed_and_not_served():
    def refuses(x, *rest):
        if x.dtype == torch.float16:
            raise NotImplementedError("no float16")
        return ema_slots(x, *rest)

    assert {"supports", "float64"} <= red_ema(ema_kernel(refuses))


def test_a_refusal_without_a_reason():
    kernel = ema_kernel(ema_slots, supports=lambda self, call, environment: Declined(" "))
    assert red_ema(kernel) == {"supports"}


def test_an_answer_that_is_neither_yes_nor_no():
    assert "supports" in red_ema(ema_kernel(ema_slots, supports=lambda self, call, environment: True))


def test_a_cached_op_whose_fake_is_wrong():
    assert red_ema(ema_kernel(ema_slots, fake=lambda x, *_: x.new_empty(x.shape[1:]))) == {"cached_op"}


def test_an_argument_that_nobody_can_give():
    schema = EMA_SLOTS.replace("Tensor fresh)", "Tensor fresh, Tensor wishes)")
    assert "prefill" in red_ema(ema_kernel(lambda *args: ema_slots(*args[:-1]), schema))


# -- a kernel with pages ----------------------------------------------------------------------------------------------


def test_entries_that_are_never_appended():
    def reads_only(x, window, append, *rest):
        return recall_paged(x, window, False, *rest)

    assert {"prefill", "decode", "chunks"} <= red_recall(recall_kernel(reads_only))


def test_a_page_table_that_is_ignored():
    def in_order(x, window, append, entries, token_slots, page_table, bounds):
        return recall_paged(x, window, append, entries, token_slots, torch.arange(1, page_table.numel() + 1).view(page_table.shape), bounds)

    assert {"prefill", "permutation", "page_boundary"} <= red_recall(recall_kernel(in_order))


def test_a_step_that_reads_only_its_own_tokens():
    def no_context(x, window, append, entries, token_slots, page_table, bounds):
        bounds = bounds.clone()
        bounds[:, 2] = 0
        return recall_paged(x, window, append, entries, token_slots, page_table, bounds)

    assert {"decode", "chunks", "ragged"} <= red_recall(recall_kernel(no_context))


def test_a_window_that_is_one_too_long():
    def too_long(x, window, *rest):
        return recall_paged(x, None if window is None else window + 1, *rest)

    red = run_checks(Recall(), RECALL_CASES, [recall_kernel(too_long)]).failed
    assert any(name.startswith("prefill") and "window" in name for name in red)
    assert not any(name.endswith("-all]") for name in red)


def test_tokens_before_the_window_that_are_still_read():
    """The mask is right, but pages that have left the window are gathered: harmless until they belong to somebody else."""

    def gathers_all(x, window, append, entries, token_slots, page_table, bounds):
        if window is None:
            return recall_paged(x, window, append, entries, token_slots, page_table, bounds)
        out, page_size, flat = torch.zeros_like(x), entries.shape[1], entries.flatten(0, 1)
        for row, (first, count, context) in enumerate(bounds.tolist()):
            if not count:
                break
            tokens = slice(first, first + count)
            if append:
                flat[token_slots[tokens]] = x[0, tokens]
            j = torch.arange(context + count)
            kept = flat[page_table[row, j // page_size] * page_size + j % page_size]
            distance = j[context:, None] - j
            blocked = (distance < 0) | (distance >= window)
            scores = (x[0, tokens] @ kept.T).nan_to_num(0).masked_fill(blocked, -torch.inf)
            out[0, tokens] = scores.softmax(-1) @ kept
        return out

    assert "window" in red_recall(recall_kernel(gathers_all))


def test_the_end_of_a_page_that_is_missed():
    def clips(x, window, append, entries, token_slots, page_table, bounds):
        last = page_table.clone()
        for row, (_, count, context) in enumerate(bounds.tolist()):
            if not count:
                break
            if (context + count) % entries.shape[1] == 1 and context:
                last[row, (context + count) // entries.shape[1]] = last[row, 0]
        return recall_paged(x, window, append, entries, token_slots, last, bounds)

    assert "page_boundary" in red_recall(recall_kernel(clips))


def test_entries_that_land_in_the_pages_of_others():
    def spills(x, window, append, entries, token_slots, page_table, bounds):
        out = recall_paged(x, window, append, entries, token_slots, page_table, bounds)
        mine = set(token_slots.tolist())
        other = next(slot for slot in range(entries.shape[1], entries.shape[0] * entries.shape[1]) if slot not in mine)
        if append:
            entries.flatten(0, 1)[other] = 1
        return out

    assert {"mutation", "padding"} <= red_recall(recall_kernel(spills))


def test_append_that_is_ignored():
    def writes_when_it_must_not(x, window, append, entries, *rest):
        out = recall_paged(x, window, append, entries, *rest)
        if not append:
            entries.flatten(0, 1)[entries.shape[1] :].nan_to_num_(0)
        return out

    assert "mutation" in red_recall(recall_kernel(writes_when_it_must_not))


def test_a_null_page_that_is_expected_to_be_zero():
    def sums_all(x, window, append, entries, *rest):
        out = recall_paged(x, window, append, entries, *rest)
        return out + 0 * entries[0].sum()

    assert {"prefill", "decode"} <= red_recall(recall_kernel(sums_all))


def test_buffers_that_are_filled_once():
    class Stale(RecallPaged):
        def prepare(self, batch, call, out):
            if int(out["bounds"][0, 0]) > 1_000_000:  # as it was allocated
                super().prepare(batch, call, out)

    red = red_recall(Stale())
    assert {"decode", "chunks", "ragged"} <= red


def test_buffers_whose_tail_is_left_from_a_larger_batch():
    class Tail(RecallPaged):
        def prepare(self, batch, call, out):
            end = out["bounds"][batch.num_sequences].clone()
            super().prepare(batch, call, out)
            if int(end.max()) < 1_000_000:
                out["bounds"][batch.num_sequences] = end

    assert "ragged" in red_recall(Tail())


def test_a_scratch_that_is_trusted_to_be_zero():
    class Trusting(RecallPaged):
        def prepare(self, batch, call, out):
            rows = [batch.host(name) for name in ("cu_seqlens", "query_lens", "context_lens")]
            out["bounds"][: batch.num_sequences] = torch.stack([rows[0][:-1], *rows[1:]], 1)

    assert {"prefill", "decode"} <= red_recall(Trusting())


def test_a_kernel_for_another_op():
    class Elsewhere(RecallPaged):
        target = "toy::ema"

    assert red_recall(Elsewhere()) == {"cached_op"}
