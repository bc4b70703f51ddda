"""What runs under `no_grad` is detached, writes too, so that loops have no switches in them."""

import pytest
import torch

from snn_compile.passes.effects import is_grad_switch
from snn_compile.passes.functionalize import functionalize
from tests.passes.capture import Spike, capture, rerolled, x


def value(a):
    with torch.no_grad():
        threshold = a[0] * 0.1
    return a[1] - threshold


def trace_of_spikes(a):
    """A trace of a learning rule: it wants no gradient, what is added to it does."""
    v, trace, out = torch.zeros_like(a[0]), torch.zeros(a.shape[1:]), []
    for t in range(a.shape[0]):
        v = v * 0.5 + a[t]
        s = Spike.apply(v - 1.0)
        with torch.no_grad():
            trace.mul_(0.9).add_(s)
            total = trace * 2.0
        v = v - s - 0.1 * total
        out.append(s)
    return torch.stack(out), trace


def value_is_bounded(a):
    """The gradient goes through the bound, as if there were none."""
    v, out = a[0] * 0.25, []
    for t in range(a.shape[0]):
        v = v * 0.5 + a[t] * a[t]
        with torch.no_grad():
            v.clamp_(max=1.0)
            v[v < 0.1] = 0.0
        out.append(v * v)
    return torch.stack(out)


def part_of_a_call(a):
    out = []
    for t in range(a.shape[0]):
        left, right = torch.split(a[t], [2, 3], dim=1)
        with torch.no_grad():
            high = left.amax(1, keepdim=True)
        out.append(right - high)
    return torch.stack(out)


def made_inside(a):
    with torch.no_grad():
        count = a[0] * 2.0
        count += a[1]
        count[0] = a[2, 0]
    return a[3] * count


def read_between_writes(a):
    v = a[0] * 2.0
    with torch.no_grad():
        v += a[1]
        seen = v * 1.0
        v *= 3.0
    return v, seen


@pytest.mark.parametrize(
    "function",
    [value, trace_of_spikes, value_is_bounded, part_of_a_call, made_inside, read_between_writes],
    ids=lambda f: f.__name__,
)
def test_no_switch_is_left(function):
    captured = capture(function, x())
    captured.check(functionalize)
    assert not any(is_grad_switch(n) for n in captured.gm.graph.nodes)


def data_is_bounded(a):
    v, w, out = torch.zeros_like(a[0]), torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        v = v * 0.5 + a[t] * a[t]
        v.data.clamp_(max=1.0)
        w = w * 0.5 + v
        w.detach().mul_(a[t])
        out.append(v * w)
    return torch.stack(out)


@pytest.mark.parametrize("function", [trace_of_spikes, value_is_bounded, data_is_bounded], ids=lambda f: f.__name__)
def test_loops(function):
    assert [loop.length for _, loop in rerolled(function, x()).loops()] == [6]


def near_miss_write_into_an_input(a, count):
    with torch.no_grad():
        count += a[0]
    return a[1] * count


def test_a_write_into_an_input_stays_under_no_grad():
    captured = capture(near_miss_write_into_an_input, x(), torch.ones(3, 5))
    captured.check(functionalize)
    assert any(is_grad_switch(n) for n in captured.gm.graph.nodes)


def test_gradients_that_are_on_inside_of_a_region_stay_on():
    def f(a):
        with torch.no_grad():
            low = a[0] * 2.0
            with torch.enable_grad():
                high = a[1] * 3.0
            low = low + a[2]
        return low * high

    captured = capture(f, x())
    captured.check(functionalize)
    assert not any(is_grad_switch(n) for n in captured.gm.graph.nodes)
