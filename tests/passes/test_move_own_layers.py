"""Layers that a step has of its own leave the steps; what is left is a loop."""

import pytest
import torch
import torch.nn.functional as F

from snn_compile.passes.functionalize import functionalize
from snn_compile.passes.move_own_layers import move_own_layers
from snn_compile.passes.reroll import reroll
from tests.passes.capture import Spike, capture

T, N = 6, 16  # (rows of 64 bytes: a product's last bits depend on alignment)
spike = Spike.apply


def weights(*shape):
    return [torch.randn(*shape).requires_grad_() for _ in range(T)]


def x():
    return torch.randn(T, 4, N).requires_grad_()


def statistics():
    return [torch.randn(N).abs() for _ in range(2 * T)]


def rewrite(gm):
    functionalize(gm)
    count = move_own_layers(gm)
    loops, _ = reroll(gm, lambda loop: None)
    return count, [(loop.length, [c.name for c in loop.carries]) for loop in loops if loop.carries]


def neurons(current, record=lambda s: s, threshold=lambda t, own: 0.3):
    """A loop over time whose step is fed ``current(a, t, own, v)``."""

    def function(a, *own):
        v, out = torch.zeros(4, N), []
        for t in range(T):
            v = v * 0.5 + current(a, t, own, v)
            s = spike(v - threshold(t, own))
            v = v - s
            out.append(record(s))
        return torch.stack(out)

    return function


before_the_state = neurons(lambda a, t, own, v: F.linear(a[t].sin(), own[t]))
#: One image, shown at every step: nothing reads x[t].
without_time = neurons(lambda a, t, own, v: F.linear(a[0], own[t]))


def behind_the_state(a, *own):
    v, total = torch.zeros(4, N), torch.zeros(4, N)
    for t in range(T):
        v = v * 0.5 + a[t]
        s = spike(v - 0.3)
        v = v - s
        total = total + F.linear(s, own[t]).cos()
    return total


def between_two_states(a, *own):
    v = u = torch.zeros(4, N)
    out = []
    for t in range(T):
        v = v * 0.5 + a[t]
        s = spike(v - 0.3)
        v = v - s
        u = u * 0.25 + F.linear(s, own[t])
        z = spike(u - 0.1)
        u = u - z
        out.append(z)
    return torch.stack(out)


@pytest.mark.parametrize(
    ("function", "moves", "recurrences"),
    [(before_the_state, 1, 1), (behind_the_state, 2, 2), (between_two_states, 2, 2), (without_time, 1, 1)],
    ids=["before the state", "behind the state", "between two states", "without time"],
)
def test_moved(function, moves, recurrences):
    captured = capture(function, x(), *weights(N, N))
    count, loops = captured.check(rewrite)
    assert count == moves and [length for length, _ in loops] == [T] * recurrences


def normed(a, t, own, v):
    """By statistics of the step's own: all means, then all variances."""
    return F.batch_norm(a[t], own[t], own[T + t], training=True)


def test_batch_norm_through_time():
    """Each step's statistics are written once, and come out as in eager (`Captured.check` compares them)."""
    captured = capture(neurons(normed), x(), *statistics())
    count, loops = captured.check(rewrite)
    assert count == 1 and [length for length, _ in loops] == [T]


def normed_twice(a, t, own, v):
    """One batch norm twice a step, in front of a layer of the step's own."""
    y = F.batch_norm(a[t], own[T], own[T + 1], training=True, momentum=0.5)
    return F.linear(F.batch_norm(y.exp(), own[T], own[T + 1], training=True, momentum=0.5), own[t])


def test_statistics_that_two_layers_update_take_the_order_of_the_steps():
    captured = capture(neurons(normed_twice), x(), *weights(N, N), torch.zeros(N), torch.ones(N))
    count, loops = captured.check(rewrite)
    assert count == 1 and T in [length for length, _ in loops]


def test_random_numbers_of_one_part():
    """They are drawn in eager's order; other draws would come between them."""

    encoded = neurons(lambda a, t, own, v: F.linear((a[t] > torch.rand_like(a[t])).float(), own[t]))
    captured = capture(encoded, x(), *weights(N, N))
    torch.manual_seed(1)
    expected = captured.gm(*captured.inputs)[0]
    count, loops = rewrite(captured.gm)
    captured.gm.recompile()
    torch.manual_seed(1)
    assert count == 1 and len(loops) == 1 and torch.equal(captured.gm(*captured.inputs)[0], expected)


# ------------------------------------------------------------------------------------------------------------ near misses


def deep_network(a, *own):
    h = a[0]
    for w in own:
        h = F.linear(h, w).relu()
    return h


def alike(count):
    """Networks that take turns in a step, such as an actor and a critic."""

    def function(a, *own):
        states, out = [torch.zeros(4, N) for _ in range(count)], []
        for t in range(T):
            for i in range(count):
                v = states[i] * 0.5 + F.linear(a[t], own[2 * i])
                s = spike(v - 0.3)
                states[i] = v - s
                out.append(F.linear(s, own[2 * i + 1]))
        return torch.stack(out)

    return function


def without_gradients(a, t, own, v):
    with torch.no_grad():
        return F.linear(a[t], own[t])


def nothing_is_carried(a, *own):
    return torch.stack([spike(F.linear(a[t], own[t])).cos() for t in range(T)])


NEAR_MISSES = {
    "deep network": deep_network,
    "recurrent weights": neurons(lambda a, t, own, v: a[t] + F.linear(v, own[t])),
    "draws on both sides": neurons(lambda a, t, own, v: F.linear(F.dropout(a[t]), own[t]), record=F.dropout),
    "without gradients": neurons(without_gradients),
    "nothing is carried": nothing_is_carried,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    captured = capture(NEAR_MISSES[name], x(), *weights(N, N))
    assert move_own_layers(captured.gm) == 0


def two_alike_within_a_step(a, *own):
    """Norse: currents and potentials decay alike, each with a constant of its own."""
    v = i = torch.zeros(4, N)
    out = []
    for t in range(T):
        i = i - own[0] * i * 0.1 + a[t]
        v = v - own[1] * v * 0.1 + i
        s = spike(v - 0.3)
        v = v - s
        out.append(s)
    return torch.stack(out)


def test_what_looks_alike_within_a_step_stays():
    captured = capture(two_alike_within_a_step, x(), *weights(N))
    count, loops = captured.check(rewrite)
    assert count == 0 and [length for length, _ in loops] == [T]


@pytest.mark.parametrize("inside", [False, True])
def test_a_tensor_that_the_steps_write_into(inside):
    """What moves to the front would read it before it is written."""

    def current(a, t, own, v):
        scale = own[T]
        y = F.linear(a[t] + scale, own[t]) if inside else F.linear(a[t], own[t]) + scale
        scale.mul_(0.9)
        return y

    captured = capture(neurons(current), x(), *weights(N, N), torch.ones(N))
    assert captured.check(move_own_layers) == (not inside)


def test_statistics_that_the_steps_read():
    captured = capture(neurons(normed, threshold=lambda t, own: own[t]), x(), *statistics())
    assert move_own_layers(captured.gm) == 0


@pytest.mark.parametrize("count", [2, 3])
def test_networks_that_take_turns_are_one_loop(count):
    captured = capture(alike(count), x(), *weights(N, N))
    moved, loops = captured.check(rewrite)
    assert moved == 0 and [(length, len(carries)) for length, carries in loops] == [(T, count)]
