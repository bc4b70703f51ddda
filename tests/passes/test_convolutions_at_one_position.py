"""A convolution over its whole input, inside a recurrence, is a product of matrices; any other is left alone."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from snn_compile.backend import snn
from snn_compile.surrogate import ATan


class Feedback(nn.Module):
    """``h = 0.5*v + x + conv(s)``: the convolution is part of the recurrence."""

    def __init__(self, kernel: tuple[int, ...], groups: int, bias: bool = True, **options: object) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]
        size = 1
        for k in kernel:
            size *= k
        self.inner = (2 * groups, *kernel)
        self.lanes = 2 * groups * size
        self.conv = kind(2 * groups, self.lanes, kernel, groups=groups, bias=bias, **options)
        self.fire = ATan()

    def forward(self, x):
        v = feedback = torch.zeros_like(x[0])
        spikes = []
        for t in range(x.shape[0]):
            h = v * 0.5 + x[t] + feedback
            s = self.fire(h - 1.0)
            v = h * (1.0 - s)
            feedback = self.conv(s.view(-1, *self.inner)).flatten(1)[:, : self.lanes]
            spikes.append(s)
        return torch.stack(spikes)


def run(net: nn.Module, step_from: int, batch: int = 5) -> int:
    """Check against eager; gives how many products of matrices one step holds."""
    x = torch.randn(6, batch, net.lanes, requires_grad=True)
    leaves = [x, *net.parameters()]
    expected = net(x)
    weights = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
    wanted = torch.autograd.grad(expected, leaves, weights)
    got = torch.compile(net, backend=snn, options={"step_from": step_from, "strict": True})(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    for a, b in zip(wanted, torch.autograd.grad(got, leaves, weights), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    return counters["snn_compile"]["convolutions_replaced"]


@pytest.mark.parametrize("step_from", [2, 32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_is_a_product(groups, bias, step_from, fresh):
    assert run(Feedback((3,), groups, bias), step_from) == 1


@pytest.mark.parametrize("kernel", [(1,), (2, 3), (1, 1), (2, 1, 2)])
def test_any_number_of_dims(kernel, fresh):
    assert run(Feedback(kernel, 3, padding="valid", stride=2), 2, batch=1) == 1


@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": "same"}])
def test_more_than_one_position(options, fresh):
    assert run(Feedback((3,), 4, **options), 2) == 0


def test_outside_of_a_recurrence_it_is_batched_as_it_is(fresh):
    weight = torch.randn(8, 2, 3)

    def f(x):
        v, out = torch.zeros(5, 8), []
        for t in range(x.shape[0]):
            h = v * 0.5 + F.conv1d(x[t].view(5, 4, 3), weight, groups=2).flatten(1)
            v = h * (h < 1)
            out.append(v)
        return torch.stack(out)

    x = torch.randn(6, 5, 12)
    got = torch.compile(f, backend=snn)(x)
    assert counters["snn_compile"]["ops_time_batched"] and not counters["snn_compile"]["convolutions_replaced"]
    torch.testing.assert_close(got, f(x))
