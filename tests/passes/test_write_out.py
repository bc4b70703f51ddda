"""``out=`` is a write, into states, records and scratch."""

import pytest
import torch
from torch._dynamo.utils import counters

from snn_compile.passes.write_out import write_out
from tests.passes.capture import capture, x

pytestmark = pytest.mark.usefixtures("fresh")


def state(a):
    v, out = torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        torch.add(v * 0.5, a[t], out=v)
        s = (v > 1.0).to(a.dtype)
        v.mul_(1.0 - s)
        out.append(s)
    return torch.stack(out), v


def record(a):
    out, v = torch.zeros_like(a), torch.zeros_like(a[0])
    for t in range(a.shape[0]):
        v = v * 0.5 + a[t]
        torch.mul(v, 2.0, out=out[t])
        v = v * (v < 1.0)
    return out, v


def scratch(a):
    v, held, out = torch.zeros_like(a[0]), torch.empty_like(a[0]), []
    for t in range(a.shape[0]):
        torch.mul(v, 0.5, out=held)
        v = held + a[t]
        v = v * (v < 1.0)
        out.append(v)
    return torch.stack(out), v


def one_of_two_equal_tensors(a):
    v, largest, out = torch.zeros_like(a[0]), torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        v = v * 0.5 + a[t]
        torch.maximum(largest, v, out=largest)
        out.append(v)
    return torch.stack(out), largest * 1.0


@pytest.mark.parametrize("function", [state, record, scratch, one_of_two_equal_tensors])
def test_equals_eager(function):
    counters.clear()
    a = torch.randn(6, 3, 4) * 2
    with torch.no_grad():
        results = torch.compile(function, backend="snn", fullgraph=True, options={"strict": True})(a)
        assert all(map(torch.equal, results, function(a)))
    assert counters["snn_compile"]["recurrences_lowered"] >= 1


def test_what_is_converted_or_given_two_tensors_stays():
    def f(a):
        whole, index = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
        torch.add(a[0], 1.0, out=whole)
        largest = torch.zeros(3)
        torch.max(a[0], 1, out=(largest, index))
        return whole * 1.0, largest * 1.0, index * 1

    captured = capture(f, x().detach())
    captured.check(lambda gm: write_out(gm.graph))
    assert sum("out" in n.kwargs for n in captured.gm.graph.nodes) == 2
