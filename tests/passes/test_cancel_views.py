"""Views there and back in a step are gone; what is left of them is made before the steps."""

import pytest
import torch

import snn_compile
from snn_compile.passes.cancel_views import cancel_views
from tests.passes.capture import Spike, capture, reroll_all


def rewrite(gm):
    count = cancel_views(gm.graph)
    loops, _ = reroll_all(gm)
    return count, loops


def along(dim):
    """A neuron along any dim, which works along the last one; `state` is kept as it came."""

    def loop(x, state, leak):
        out = []
        for t in range(len(x)):
            v = state.movedim(dim, -1) * leak + x[t].movedim(dim, -1)
            s = Spike.apply(v - 1.0)
            v = v * (1.0 - s)
            out.append(s.movedim(-1, dim))
            state = v.movedim(-1, dim)
        return torch.stack(out), state

    return loop


@pytest.mark.parametrize(("dim", "count"), [(-1, 4 * 6), (1, 5), (0, 5)])
def test_a_state_that_is_turned_in_every_step_is_turned_once(dim, count):
    x = torch.randn(6, 2, 3, 4, requires_grad=True)
    captured = capture(along(dim), x, torch.randn(2, 3, 4), torch.rand(x.shape[1:][dim]))
    found, loops = captured.check(rewrite)
    assert found == count and [loop.length for loop in loops] == [6]


def test_the_state_may_start_as_zeros():
    function = along(1)
    captured = capture(lambda x, leak: function(x, torch.zeros_like(x[0]), leak), torch.randn(6, 2, 3, 4), torch.rand(3))
    (loop,) = captured.check(rewrite)[1]
    assert loop.length == 6


def test_the_first_op_may_be_one():
    captured = capture(lambda x, v: x.movedim(-1, -1) + v.exp() * v.t().exp().t(), torch.randn(3, 3), torch.randn(3, 3))
    assert captured.check(lambda gm: cancel_views(gm.graph)) == 1


OTHERS = {
    "another dim back": lambda v: v.movedim(0, -1).movedim(-1, 1),
    "other elements in the same places": lambda v: v.transpose(0, 1).reshape(2, 4, 2),
    "a copy": lambda v: v.flip(0).flip(0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_looks_otherwise_stays(name):
    captured = capture(lambda v: OTHERS[name](v) * 2.0, torch.randn(2, 4, 2))
    assert captured.check(lambda gm: cancel_views(gm.graph)) == 0


def test_what_is_written_into_stays():
    def function(v):
        u = v * 2.0
        u.t().t().mul_(0.5)
        return u

    captured = capture(function, torch.randn(3, 3))
    assert captured.check(lambda gm: cancel_views(gm.graph)) == 0


@pytest.mark.parametrize("dim", [-1, 1])
def test_it_is_one_kernel(dim):
    torch.manual_seed(0)
    x = (torch.randn(6, 2, 3, 4) + 0.5).requires_grad_()
    state, leak = torch.randn(2, 3, 4), torch.rand(x.shape[1:][dim], requires_grad=True)
    found = snn_compile.explain(along(dim))(x, state, leak)
    assert len(found.recurrences) == 1 and "Left to Inductor" not in str(found)
    torch._dynamo.reset()
    for a, b in zip(along(dim)(x, state, leak), torch.compile(along(dim), backend="snn")(x, state, leak), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_what_only_reads_parameters_is_no_part_of_the_kernel():
    """`asinh`, which no kernel holds, of a parameter: once, before the loop."""

    def loop(x, bias):
        v, out = torch.zeros_like(x[0]), []
        for t in range(len(x)):
            v = v * 0.5 + x[t] + torch.asinh(bias)
            out.append(v)
        return torch.stack(out)

    torch.manual_seed(0)
    x, bias = torch.randn(6, 3, 4), torch.randn(4)
    found = snn_compile.explain(loop)(x, bias)
    assert len(found.recurrences) == 1 and "Left to Inductor" not in str(found)
    torch._dynamo.reset()
    got = torch.compile(loop, backend="snn")(x, bias)
    torch.testing.assert_close(got, loop(x, bias), rtol=0, atol=1e-6)  # (the call is Inductor's `asinh`)
