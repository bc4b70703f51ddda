"""Delay lines: what a layer reads of earlier steps is a series that starts later."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from snn_compile.backend import snn
from snn_compile.lowering.cpp import compiler
from snn_compile.passes.distribute import distribute
from snn_compile.passes.shift_series import shift_series
from tests.passes.capture import Spike, capture, infos, reroll_all, x

T, N = 12, 16  # (rows of 64 bytes: a product's last bits depend on alignment)


def delayed(steps, first=torch.zeros_like, order=lambda times: times):
    """``linear`` of the input of `steps` steps ago, into a neuron."""

    def function(a, w):
        line, v, out = [first(a[0]) for _ in range(steps)], torch.zeros(3, N), []
        for t in order(range(a.shape[0])):
            line.append(a[t].sin())
            v = v * 0.5 + F.linear(line.pop(0), w)
            s = Spike.apply(v - 0.3)
            v = v - s
            out.append(s)
        return torch.stack(out)

    return function


def shifted(function, *inputs):
    captured = capture(function, *inputs)
    captured.check(reroll_all)

    def rewrite(gm):
        for call, loop in captured.loops():
            distribute(gm, call, loop, infos(loop))
        return sum(shift_series(gm, call, loop) for call, loop in captured.loops() if not loop.is_recurrent)

    return captured.check(rewrite)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_delay_of_some_steps(steps):
    assert shifted(delayed(steps), x(T, 3, N), torch.randn(N, N)) == steps


def last_is_wanted(a, w):
    before, out = torch.zeros(3, N), []
    for t in range(a.shape[0]):
        out.append(F.linear(before, w))
        before = a[t].sin()
    return torch.stack(out).cumsum(0), before


NEAR_MISSES = {
    "a first value that is broadcast": delayed(1, lambda a: torch.zeros(1, N)),
    "backwards": delayed(1, order=reversed),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    captured = capture(NEAR_MISSES[name], x(T, 3, N), torch.randn(N, N))
    captured.check(reroll_all)
    for call, loop in captured.loops():
        if not loop.is_recurrent:
            before = [c.name for c in loop.carries]
            shift_series(captured.gm, call, loop)
            assert [c.name for c in loop.carries] == before


def test_a_last_value_that_is_wanted_stays_right():
    shifted(last_is_wanted, x(T, 3, N), torch.randn(N, N))


@pytest.mark.skipif(compiler.missing() is not None, reason="no C++ compiler")
def test_a_layer_behind_a_delay_runs_once(fresh):
    module = nn.Linear(N, N)
    given = x(T, 3, N)

    def network(a):
        return delayed(2)(a, module.weight)

    with torch.no_grad():
        expected = network(given)
        assert torch.equal(torch.compile(network, backend=snn)(given), expected) and expected.std() > 0
    found = counters["snn_compile"]
    assert found["recurrences_lowered"] == 1 and found["ops_time_batched"] >= 2
