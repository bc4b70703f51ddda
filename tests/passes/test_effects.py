"""What an op does beside giving its result outlasts every pass, where nobody reads the result."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops.scan import scan

from snn_compile.passes.effects import has_effect
from tests.passes.capture import Spike, capture

pytestmark = pytest.mark.usefixtures("fresh")


def fire(v, x):
    v = v * 0.5 + x
    s = Spike.apply(v - 1.0)
    return v * (1.0 - s), s


def by_loop(x, step=fire):
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v, s = step(v, x[t])
        out.append(s)
    return torch.stack(out)


def by_scan(x):
    return scan(lambda v, x: fire(v, x), torch.zeros_like(x[0]), x)[1]


CELL = nn.GRUCell(5, 5).requires_grad_(False)
REGION = torch.compiler.nested_compile_region(fire)


def by_cell(x):
    h, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        h = CELL(x[t], h)
        out.append(h)
    return torch.stack(out)


def by_region(x):
    return by_loop(x, REGION)


def operator_write(x, c):
    c += 1.0


EFFECTS = {
    "method": lambda x, c: c.add_(1.0),
    "operator": operator_write,
    "out": lambda x, c: torch.add(c, 2.0, out=c),
    "copy": lambda x, c: c.copy_(x[0, 0]),
    "statistics": lambda x, c: F.batch_norm(x[0], c, torch.ones(5), training=True),
    "written random numbers": lambda x, c: c.bernoulli_(0.5),
}
DRAWS = {
    "rand": lambda x: torch.rand(3),
    "randn_like": torch.randn_like,
    "bernoulli": torch.bernoulli,
    "method": lambda x: x.bernoulli(),
    "F.dropout": lambda x: F.dropout(x, 0.5, True),
    "torch.dropout": lambda x: torch.dropout(x, 0.5, True),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "gumbel_softmax": F.gumbel_softmax,
}


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("loop", (by_loop, by_scan, by_cell, by_region), ids=lambda f: f.__name__)
def test_unread(loop, effect):
    def f(x, c):
        EFFECTS[effect](x, c)
        return loop(x)

    x, results = torch.rand(6, 4, 5) * 2.0, []
    for run in (f, torch.compile(f, backend="snn")):
        torch.manual_seed(0)
        c = torch.zeros(5)
        results.append((c, run(x, c)))
    (expected_c, expected), (c, got) = results
    assert torch.equal(c, expected_c) and c.any()
    torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-6)  # (of the cell; the others are exact)


@pytest.mark.parametrize("draw", DRAWS)
def test_random_numbers(draw):
    """The next ones to be drawn would be others."""

    def f(x):
        return (DRAWS[draw](x) + 0.0).sum() + x

    captured = capture(f, torch.rand(4, 5))
    assert any(has_effect(n) for n in captured.gm.graph.nodes if n.op in ("call_function", "call_method"))
    sums = [n for n in captured.gm.graph.nodes if n.target in ("sum", "add", operator.add)]
    assert sums and not any(map(has_effect, sums))


def test_in_every_step():
    def f(x, c):
        v, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            v, s = fire(v, x[t])
            F.batch_norm(x[t], c, torch.ones(5), training=True)
            out.append(s)
        return torch.stack(out)

    x, counted, expected = torch.rand(6, 4, 5), torch.zeros(5), torch.zeros(5)
    assert torch.equal(torch.compile(f, backend="snn")(x, counted), f(x, expected))
    torch.testing.assert_close(counted, expected)
    assert counted.any()
