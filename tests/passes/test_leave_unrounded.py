"""Half-precision gradients are rounded where they are stored; what decides something is rounded as eager rounds it."""

import pytest
import torch
from torch import nn

from snn_compile import neuron
from snn_compile.backend import snn
from snn_compile.explain import explain
from tests.passes.capture import Spike


class Gated(Spike):
    """A spike whose gradient passes only where it is large: the gradient is compared."""

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        slope = 1 / (1 + u * u)
        return torch.where((grad * slope).abs() > 0.125, grad * slope, 0.0)


class Net(nn.Module):
    def forward(self, x):
        v, spikes = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            h = v + (x[t] - v) / 2.0
            s = Gated.apply(h - 1.0)
            v = h * (1.0 - s.detach())
            spikes.append(s)
        return torch.stack(spikes)


def rounded(module: nn.Module, dtype: torch.dtype) -> dict[str, bool]:
    """Which ops of the backward step round their result: all that vary over time, by name."""
    (recurrence,) = explain(module)(torch.rand(6, 4, 33, dtype=dtype).requires_grad_()).recurrences
    nodes = recurrence.backward.graph.nodes
    return {n.name: n.meta["is_rounded"] for n in nodes if "is_rounded" in n.meta}


def test_only_what_is_compared(fresh):
    marks = rounded(neuron.LIFNode(step_mode="m"), torch.bfloat16)
    assert sum(marks.values()) == 4 < len(marks), (
        marks
    )  # h - 1 >= 0, and what h is computed from; of h - 1 the sign alone is read


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_that_is_compared_is_eagers(dtype, fresh):
    x = (torch.rand(3, 64, 129) * 2).to(dtype).requires_grad_()
    weights = torch.randn(3, 64, 129).to(dtype)
    net = Net()
    expected = torch.autograd.grad(net(x), x, weights)[0][-1]  # (of the last step: no gradient comes from a later one)
    got = torch.autograd.grad(torch.compile(net, backend=snn)(x), x, weights)[0][-1]
    assert torch.equal(got == 0, expected == 0) and 0.1 < float((got == 0).float().mean()) < 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_no_larger_than_eagers(dtype, fresh):
    """Beside gradients in fp64 over eager's own spikes and potentials."""
    torch.manual_seed(0)
    x = (torch.rand(12, 16, 65) * 2).to(dtype).requires_grad_()
    weights = torch.randn(12, 16, 65).to(dtype)
    net = neuron.LIFNode(step_mode="m", detach_reset=True)
    (expected,) = torch.autograd.grad(net(x), x, weights)
    net.reset()
    (got,) = torch.autograd.grad(torch.compile(net, backend=snn)(x), x, weights)

    h, v = [], torch.zeros(16, 65, dtype=dtype)
    for t in range(12):
        h.append(v + (x[t].detach() - v) / 2.0)
        s = (h[-1] - 1.0 >= 0).to(dtype)
        v = 0.0 * s + (1.0 - s) * h[-1]
    exact, grad_v = [], torch.zeros(16, 65, dtype=torch.float64)
    for t in reversed(range(12)):
        u = h[t].double() - 1.0
        sigmoid = torch.sigmoid(4 * u)
        grad_h = weights[t].double() * 4 * sigmoid * (1 - sigmoid) + grad_v * (u < 0)
        exact.insert(0, grad_h / 2)
        grad_v = grad_h / 2
    reference = torch.stack(exact)
    assert (got - reference).abs().mean() < 0.8 * (expected - reference).abs().mean()
