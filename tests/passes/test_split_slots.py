"""States in one tensor are tensors of their own, whichever way they are written into; records and views stay."""

import pytest
import torch

import snn_compile
from snn_compile.backend import snn
from snn_compile.passes.split_slots import split_slots
from tests.passes.capture import Spike, capture, reroll_all, x

T, B, N = 6, 3, 5


def rewrite(gm):
    count = split_slots(gm.graph)
    loops, _ = reroll_all(gm)
    return count, len(loops)


def two_layers(a):
    mem, out = torch.zeros(2, *a.shape[1:]), []
    for t in range(a.shape[0]):
        mem[0] = 0.9 * mem[0] + a[t]
        first = Spike.apply(mem[0] - 1.0)
        mem[0] = mem[0] - first  # (a product would need for its backward what is written into: eager has none)
        mem[1] = 0.9 * mem[1] + first
        second = Spike.apply(mem[1] - 1.0)
        mem[1] = mem[1] - second
        out.append(second)
    return torch.stack(out), mem


def along_another_dim(a):
    mem, out = a.new_zeros(a.shape[1], 2, a.shape[2]), []
    for t in range(a.shape[0]):
        mem[:, 0] += a[t]
        mem[:, -1] = 0.5 * mem[:, 1] + Spike.apply(mem[:, 0] - 1.0)
        mem[:, 0] *= 0.5
        out.append(mem[:, 1] * 1.0)
    return torch.stack(out), mem.sum(1), mem[:, 1]


def under_other_names(a):
    states, out = torch.full((2, *a.shape[1:]), 0.25), []
    for t in range(a.shape[0]):
        v = states[0]
        v.mul_(0.5).add_(a[t])
        out.append(v > 1.0)
        v.masked_fill_(out[-1], 0.0)
    return torch.stack(out), states


def started_from_an_input(a):
    mem, out = torch.empty_like(a[:2]), []
    mem[0] = a[0]
    mem[1] = 0.5
    for t in range(a.shape[0]):
        mem[1] = mem[1] * 0.5 + mem[0]
        mem[0] = mem[0] * 0.9 + a[t]
        out.append(Spike.apply(mem[1] - 1.0))
    return torch.stack(out), mem


def records_that_are_corrected(a):
    v, s = torch.zeros_like(a), torch.zeros_like(a)
    for t in range(1, a.shape[0]):
        v[t] = v[t - 1] * 0.9 + a[t]
        fired = v[t] > 1.0
        s[t][fired] = 1.0
        v[t][fired] = 0.0
    return v, s


def another_dtype(a):
    mem, out = torch.zeros(2, *a.shape[1:], dtype=torch.float64), []
    for t in range(a.shape[0]):
        mem[0] = 0.9 * mem[0] + a[t]
        mem[1] = (mem[0] > 1.0).float()
        mem[0] = mem[0] - mem[1]
        out.append(mem[1] * 1.0)
    return torch.stack(out), mem


def ranges(a):
    state, n, out = torch.zeros(a.shape[1], 2 * a.shape[2]), a.shape[2], []
    for t in range(a.shape[0]):
        state[:, n:] = 0.8 * state[:, n:] + a[t]
        v = state[..., :n]
        v.mul_(0.9).add_(state[:, n:])
        out.append(v > 1.0)
    return torch.stack(out), state


def pieces(a):
    state, out = torch.zeros(a.shape[1], 2 * a.shape[2]), []
    for t in range(a.shape[0]):
        v, i = state.chunk(2, 1)
        i.mul_(0.8).add_(a[t])
        v.mul_(0.9).add_(i)
        out.append(v > 1.0)
    return torch.stack(out), state


def unbound_once(a):
    state, out = torch.zeros(2, *a.shape[1:]), []
    v, i = state
    for t in range(a.shape[0]):
        i.mul_(0.8).add_(a[t])
        v.mul_(0.9).add_(i)
        out.append(v > 1.0)
    return torch.stack(out), state.sum(0)


def gates(a):
    """A new tensor in every step, the pieces of which are worked on in place."""
    v, out = torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        opened, driven = torch.cat([a[t] * 0.5, a[t] + v], 1).chunk(2, 1)
        opened.clamp_(0.0, 1.0)
        driven.relu_()
        v = v * opened + driven
        out.append(v)
    return torch.stack(out), v


def written_without_gradients(a):
    """The gradient goes on to what was there before."""
    state, out = torch.full((2, *a.shape[1:]), 0.25), []
    for t in range(a.shape[0]):
        with torch.no_grad():
            state[0] = a[t]
        state[1] = a[t] * (state[0] > 0.5) + state[1]
        state[0] = state[0] - state[1] * 0.25
        out.append(state[0] * 1.0)
    return torch.stack(out), state


def filled_as_a_whole(a):
    states, out = torch.ones(2, *a.shape[1:]), []
    states.mul_(0.5).add_(states)
    for t in range(a.shape[0]):
        states[0].mul_(0.5).add_(a[t])
        states[1] = states[1] * 0.9 + Spike.apply(states[0] - 1.0)
        out.append(states[1] * 1.0)
    return torch.stack(out), states


SPLIT = (
    two_layers,
    along_another_dim,
    under_other_names,
    started_from_an_input,
    records_that_are_corrected,
    another_dtype,
    ranges,
    pieces,
    unbound_once,
    gates,
    written_without_gradients,
    filled_as_a_whole,
)
COUNTS = {records_that_are_corrected: 2, gates: T}
#: eager does not write into the pieces of a tensor that wants a gradient
NO_GRADIENT = (pieces, unbound_once, gates)


@pytest.mark.parametrize("wants_gradient", [False, True])
@pytest.mark.parametrize("function", SPLIT)
def test_slots_are_states(function, wants_gradient):
    if wants_gradient and function in NO_GRADIENT:
        pytest.skip("eager has no gradient")
    captured = capture(function, x(T, B, N).detach().requires_grad_(wants_gradient))
    count, loops = captured.check(rewrite)
    assert count == COUNTS.get(function, 1) and loops > 0


@pytest.mark.parametrize("function", SPLIT)
def test_whole_programs_are_one_recurrence(function):
    a = x(T, B, N).detach()
    found = snn_compile.explain(function)(a)
    assert [r.meta["steps"] for r in found.recurrences] == [T - 1 if function is records_that_are_corrected else T]
    torch._dynamo.reset()
    results = torch.compile(function, backend=snn, fullgraph=True, options={"strict": True})(a)
    assert all(map(torch.equal, results, function(a)))


def a_record(a, mem):
    mem[0] = a[0]
    mem[1].copy_(a[1])


def a_slot_of_the_given(a, mem):
    a[0].mul_(0.5)
    a[0].add_(1.0)


def a_slice(a, mem):
    mem[0] = a[0]
    mem[0:1] *= 0.5


def a_mask_of_all(a, mem):
    mem[0] += a[0]
    mem[0] += a[0]
    mem[mem > 1.0] = 0.0


def a_part_of_a_slot(a, mem):
    mem[0] += a[0]
    mem[0, 1:] += a[0, 1:]


def slots_of_two_dims(a, mem):
    mem[0] += a[0]
    mem[:, 0] += a[:2, 0]


def a_whole_before_a_write(a, mem):
    mem[0] += a[0]
    a.sub_(mem.sum())
    mem[0] += a[0]


def a_view_of_the_whole(a, mem):
    flat = mem.view(-1)
    mem[0] += a[0]
    mem[0] *= 0.5
    a[0].mul_(flat.sum())


def a_view_of_a_slot(a, mem):
    mem[0] += a[0]
    mem[0].t()[0] += 1.0


def a_slot_read_without_gradients(a, mem):
    """(what eager says of it, where one is wanted, it says compiled)"""
    mem[0] += a[0]
    with torch.no_grad():
        u = mem[0]
    mem[1] = u * 2.0
    mem[1] += a[1]


def ranges_that_overlap(a, mem):
    mem[:, :2] += a[:2, :2]
    mem[:, 1:] += a[:2, 1:]


def a_row_of_what_was_computed(a, mem):
    new = mem + a[:2]
    new[0].mul_(2.0)
    mem.copy_(new)


def a_row_in_every_row(a, mem):
    mem[0] = a[0]
    mem[0] = a[0, 0]


NEAR_MISSES = (
    a_record,
    a_slot_of_the_given,
    a_slice,
    a_mask_of_all,
    a_part_of_a_slot,
    slots_of_two_dims,
    a_whole_before_a_write,
    a_view_of_the_whole,
    a_view_of_a_slot,
    a_slot_read_without_gradients,
    ranges_that_overlap,
    a_row_of_what_was_computed,
    a_row_in_every_row,
)


@pytest.mark.parametrize("write", NEAR_MISSES)
def test_near_misses_stay(write):
    def function(a):
        mem = torch.zeros(2, *a.shape[1:])
        write(a, mem)
        return mem * 2.0

    captured = capture(function, x(T, B, N).detach())
    assert captured.check(lambda gm: split_slots(gm.graph)) == 0


@pytest.mark.parametrize("result", [lambda mem, slot: slot, lambda mem, slot: mem.view(-1), lambda mem, slot: (slot * 1.0, mem)])
def test_results_share_memory_where_they_did(result):
    """A slot that is a result shares its memory with the whole: it stays."""

    def function(a):
        mem = torch.zeros(2, *a.shape[1:])
        slot = mem[1]
        mem[1] = a[0]
        slot.mul_(0.5)
        return mem, result(mem, slot)

    captured = capture(function, x(T, B, N).detach())
    outputs = [o.untyped_storage().data_ptr() for o in captured.run()[0]]
    captured.check(lambda gm: split_slots(gm.graph))
    after = [o.untyped_storage().data_ptr() for o in captured.run()[0]]
    assert [p == outputs[0] for p in outputs] == [p == after[0] for p in after]


def test_a_tensor_of_many_slots_that_are_not_used_stays():
    def function(a):
        table = torch.zeros(1000, *a.shape[1:])
        table[3] += a[0]
        table[3] *= 2.0
        return table.sum(0)

    captured = capture(function, x(T, B, N).detach())
    assert captured.check(lambda gm: split_slots(gm.graph)) == 0
