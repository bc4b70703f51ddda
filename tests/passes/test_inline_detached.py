import pytest
import torch

from snn_compile.passes.inline_detached import inline_detached
from tests.passes.capture import capture, reroll_all, x


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad / (1.0 + u.abs()) ** 2


def subtracting(reset):
    """A neuron that takes the spike of its last potential, by way of `reset`, off the next one."""

    def function(a):
        v, out = torch.zeros(a.shape[1:]), []
        for t in range(a.shape[0]):
            v = 0.9 * v + a[t] - reset(Spike.apply(v - 1.0))
            out.append(Spike.apply(v - 1.0))
        return torch.stack(out)

    return function


DETACHED = {
    "detach": lambda s: s.detach(),
    "clone and detach": lambda s: s.clone().detach(),
    "arithmetic, then detach": lambda s: (s * 0.5 + 0.25).detach(),
}


@pytest.mark.parametrize("name", DETACHED)
def test_first_step_is_like_all_others(name):
    captured = capture(subtracting(DETACHED[name]), x())
    assert captured.check(inline_detached) == 5  # (the first step's is no function: its state wants no gradient)
    captured.check(reroll_all)
    (_, loop), *others = captured.loops()
    assert not others and loop.length == 6 and len(loop.carries) == 1


NEAR_MISSES = {
    "a gradient": lambda s: s,
    "a gradient beside the detached value": lambda s: s.detach() + 0.1 * s,
    "detached for a while": lambda s: s + s.detach() - s.detach(),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name):
    captured = capture(subtracting(NEAR_MISSES[name]), x())
    assert captured.check(inline_detached) == 0


def test_near_miss_written_into_a_tensor_with_a_gradient():
    def function(a):
        out = a * 2.0
        s = Spike.apply(a)
        out[0] = s[0]
        return out + s.detach()

    captured = capture(function, x())
    assert captured.check(inline_detached) == 0
