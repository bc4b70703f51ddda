"""Code that `torch.func` transforms means something else than its examples say: it is left alone, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.func import grad, jvp, vmap

from snn_compile import backend

STEPS = 6


def rate(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    v, out = torch.zeros(x.shape[1], weight.shape[0]), 0.0
    for t in range(STEPS):
        v = v * 0.9 + torch.nn.functional.linear(x[t], weight, bias)
        soft = torch.sigmoid(4.0 * (v - 1.0))
        s = soft + ((v > 1.0).float() - soft).detach()
        v = v - s
        out = out + s * v
    return out


def loss(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return rate(weight, bias, x).square().mean()


TRANSFORMED: dict[str, tuple[Callable[..., object], str]] = {
    "grad": (lambda w, b, x: grad(loss, argnums=(0, 1))(w, b, x), "torch.func.grad"),
    "vmap": (lambda w, b, x: vmap(rate, in_dims=(None, None, 1))(w, b, x.unsqueeze(2)), "torch.func.vmap"),
    "jvp": (lambda w, b, x: jvp(lambda w: rate(w, b, x), (w,), (torch.ones_like(w),)), "torch.func."),
}


@pytest.fixture
def reasons(fresh, monkeypatch):
    """Why code was left alone."""
    found: list[str] = []
    monkeypatch.setattr(backend, "listeners", [lambda report: found.extend(r.reason for r in report.rejections)])
    return found


@pytest.mark.parametrize("name", TRANSFORMED)
def test_is_left_alone(reasons, name):
    function, reason = TRANSFORMED[name]
    operands = torch.randn(5, 3), torch.randn(5), torch.randn(STEPS, 4, 3) * 2.0
    expected = function(*operands)
    found = torch.compile(function, backend="snn", fullgraph=True, options={"strict": True})(*operands)
    torch.testing.assert_close(found, expected)
    assert reasons and all(r.startswith(reason) for r in reasons)
    assert counters["snn_compile"]["recurrences_lowered"] == 0


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="Dynamo does not trace gradients here")
@pytest.mark.parametrize("create_graph", [True, False])
def test_a_gradient_that_is_differentiated(reasons, create_graph):
    def function(w, b, x):
        (g,) = torch.autograd.grad(rate(w, b, x).sum(), x, create_graph=create_graph)
        return g.square().sum() if create_graph else g

    w, b = torch.randn(5, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    x = (torch.randn(STEPS, 4, 3) * 2.0).requires_grad_()
    expected = function(w, b, x)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = torch.compile(function, backend="snn", options={"strict": True})(w, b, x)
    torch.testing.assert_close(found, expected)
    assert any("create_graph" in r for r in reasons) == create_graph
    assert counters["snn_compile"]["recurrences_lowered"] == (not create_graph)
    if create_graph:
        gradients = (torch.autograd.grad(loss, (w, b)) for loss in (found, expected))
        torch.testing.assert_close(*gradients)
