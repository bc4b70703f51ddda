"""One LIF neuron, written as its users write it: two loops and a scan."""

from __future__ import annotations

import torch
from torch import Tensor


class Sigmoid(torch.autograd.Function):
    """Heaviside forward, the derivative of a sigmoid of slope 4 backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(4.0 * x)
        return grad * 4.0 * s * (1.0 - s)


def lif_unbind(x: Tensor) -> Tensor:
    """The loop as a careful user writes it: `unbind` once, backward linear in T."""
    v, out = torch.zeros_like(x[0]), []
    for xt in x.unbind(0):
        h = v + (xt - v) / 2.0
        s = Sigmoid.apply(h - 1.0)
        v = h * (1.0 - s)
        out.append(s)
    return torch.stack(out)


def lif_index(x: Tensor) -> Tensor:
    """The natural loop over ``x[t]``: its eager backward is quadratic in T."""
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        h = v + (x[t] - v) / 2.0
        s = Sigmoid.apply(h - 1.0)
        v = h * (1.0 - s)
        out.append(s)
    return torch.stack(out)


def lif_scan(x: Tensor) -> Tensor:
    """The same neuron as a `scan`, of which one step is traced."""
    from torch._higher_order_ops.scan import scan

    def step(v: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        h = v + (xt - v) / 2.0
        s = Sigmoid.apply(h - 1.0)
        return h * (1.0 - s), s.clone()

    return scan(step, torch.zeros_like(x[0]), x)[1]  # type: ignore[no-any-return]
