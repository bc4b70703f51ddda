import operator

import pytest
import torch

from snn_compile.passes.functionalize import functionalize, store
from snn_compile.passes.unwrap_steps import unwrap_steps
from tests.passes.capture import capture, reroll_all, x


def test_what_is_wrapped_is_itself():
    def f(a):
        b = a[0] * 2.0
        pair = torch.stack([b, b + 1.0], dim=0)
        return b.unsqueeze(0)[0] - 1.0, b[None][-1] - 1.0, torch.unsqueeze(b, 0).unbind(0)[0] - 1.0, pair[1] - 1.0, pair[-2] - 1.0

    captured = capture(f, x())
    assert captured.check(unwrap_steps) == 5
    assert torch.stack not in captured.targets() and "unsqueeze" not in captured.targets()


def test_near_misses():
    """Another dim, another index than a number, a stack that is written into, or one of what is written into later."""

    def f(a):
        b, c = a[0] * 2.0, a[1] * 2.0
        written, kept = torch.stack([b]), torch.stack([c])
        written[0].mul_(3.0)
        c.add_(1.0)
        other = b.unsqueeze(1)[0], torch.stack([b, b + 1.0], 1)[1], b.unsqueeze(0)[0:1]
        return (written[0] - 1.0, kept[0] - 1.0, *(o - 1.0 for o in other))

    captured = capture(f, x().detach())
    captured.check(unwrap_steps)
    assert captured.targets().count(torch.stack) == 3


def _states(pack, unpack):
    def function(a):
        packed, out = pack(torch.zeros_like(a[0]), torch.ones_like(a[0])), []
        for t in range(a.shape[0]):
            v, i = unpack(packed)
            i = 0.8 * i + a[t]
            v = 0.9 * v + i
            out.append(v)
            packed = pack(v, i)
        return torch.stack(out), packed

    return function


PACKED = {
    "stack": _states(lambda v, i: torch.stack([v, i]), lambda p: p),
    "stack along another dim": _states(lambda v, i: torch.stack([v, i], -1), lambda p: (p[..., 0], p.select(-1, 1))),
    "cat": _states(lambda v, i: torch.cat([v, i], 1), lambda p: p.chunk(2, 1)),
    "cat, split": _states(lambda v, i: torch.cat([v, i], -1), lambda p: p.split(5, dim=-1)),
    "cat, sliced": _states(lambda v, i: torch.cat((v, i)), lambda p: (p[:3], p[3:])),
    "cat, narrowed": _states(lambda v, i: torch.cat([i, v], 1), lambda p: (p.narrow(1, 5, 5), torch.narrow(p, 1, 0, 5))),
}


@pytest.mark.parametrize("name", PACKED)
def test_states_handed_on_in_one_tensor(name):
    captured = capture(PACKED[name], x())
    assert captured.check(unwrap_steps) == 2 * 6
    loops, _ = captured.check(reroll_all)
    assert [len(loop.carries) for loop in loops] == [2]


def test_other_parts_of_what_was_joined():
    """Parts of pieces, of several pieces, along another dim, in another dtype, results, and views of what lies otherwise."""

    def f(a):
        joined, stacked = torch.cat([a[0] * 2.0, a[1] * 2.0], 1), torch.stack([a[0], a[1]], 1)
        turned = torch.cat([a[2].t() * 2.0, a[3].t() * 2.0])
        parts = joined[:, :4], joined[:, 1:6], joined[:2], stacked[:, :1], stacked[0], torch.cat([joined, joined])[0]
        wider = torch.stack([a[0], a[1].double()])[0], torch.cat([a[0], a[1].double()])[:3]
        return (*(p - 1.0 for p in (*parts, *wider)), joined[:, :5], turned[:5].t().reshape(-1) - 1.0, turned[:5].view(15) - 1.0)

    captured = capture(f, x())
    before = [(o.stride(), o.dtype) for o in captured.run()[0]]
    captured.check(unwrap_steps)
    assert [(o.stride(), o.dtype) for o in captured.run()[0]] == before


def test_a_value_that_is_written_over_is_dropped():
    def f(x):
        v = torch.zeros(x.shape[0] + 1, *x.shape[1:])
        for t in range(x.shape[0]):
            v[t + 1] = v[t] * 0.5 + x[t]
            v[t + 1] = v[t + 1] * (v[t + 1] < 1)
        return v

    captured = capture(f, x(5, 3).detach())
    captured.check(functionalize)
    captured.check(unwrap_steps)
    assert sum(n.target is store for n in captured.gm.graph.nodes) == 5


def test_what_is_stored_is_read_back():
    def f(a):
        out, rest = torch.zeros_like(a), torch.zeros(5, 6, 3)
        out[0] = a[0] * 2.0
        rest[:, 0] = out[0].t()
        for t in range(1, a.shape[0]):
            out[t] = 0.25 if t == 3 else out[t - 1] + a[t]
            rest[:, t] = (out[t - 1] * rest[:, t - 1].t()).t()
        return out, rest

    captured = capture(f, x().detach())
    captured.check(functionalize)
    reads = captured.targets().count(operator.getitem)
    assert captured.check(unwrap_steps) == 8 + 5  # (`out[3]` is a number)
    assert captured.targets().count(operator.getitem) == reads - 13


def test_a_view_that_was_stored_is_not_what_it_was():
    """The store has its value of then. (Writes through views stay writes.)"""

    def f(a):
        out, kept = torch.zeros_like(a), a[0] * 1.0
        for t in range(a.shape[0]):
            out[t] = kept
            kept.view(-1).add_(1.0)
            kept = kept * out[t]
        return out

    captured = capture(f, x().detach())
    captured.check(functionalize)
    assert captured.check(unwrap_steps) == 0
