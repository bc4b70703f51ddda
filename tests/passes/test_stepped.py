"""`trace_stepped`, `split_step`, `carry_statistics`: what becomes a kernel, a call, a product over all steps.

That the programs compute what the loop means is checked for every entry of `tests/zoo.py` with ``stepped=1``.
"""

import pytest
import torch
import torch.nn.functional as F

from snn_compile.errors import Reject
from snn_compile.ir.recurrence import Carry, Const, Output, TimeSeries
from snn_compile.ir.stepped import Call, Region
from snn_compile.lowering import ops
from snn_compile.passes.carry_statistics import carry_statistics
from snn_compile.passes.trace_stepped import trace_stepped
from tests.passes.capture import Spike, rerolled, x

F32 = torch.float32


def traced(body, carries, xs, consts, dtype=F32, ys=1, needs_grad=True):
    """`carries`, `xs`, `consts`: shapes of one step's operands."""
    examples = [torch.empty(s, dtype=dtype) for s in (*carries, *xs, *consts)]
    return trace_stepped(
        body,
        examples,
        name="loop",
        carries=[Carry(f"c{i}", dtype) for i in range(len(carries))],
        xs=[TimeSeries(f"x{i}", dtype, needs_grad) for i in range(len(xs))],
        consts=[Const(f"w{i}", dtype, needs_grad) for i in range(len(consts))],
        ys=[Output(f"y{i}", dtype) for i in range(ys)],
        supported=ops.is_supported,
    )


def recurrent_lif(v, s, x, w, b):
    h = 0.9 * v + x + F.linear(s, w, b)
    s = Spike.apply(h - 1.0)
    return h - s, s, s


LIF = ([(4, 6), (4, 6)], [(4, 6)], [(6, 6), (6,)])


def calls(program) -> list[str]:
    return [str(u.target) for u in program.units if isinstance(u, Call)]


def regions(program) -> list[Region]:
    return [u for u in program.units if isinstance(u, Region)]


def test_a_step_is_one_call_and_one_kernel():
    r = traced(recurrent_lif, *LIF)
    assert calls(r.forward) == ["aten.addmm.default"] and len(regions(r.forward)) == 1
    assert calls(r.backward) == ["aten.mm.default"] and len(regions(r.backward)) == 1
    (kernel,) = (u.kernel for u in regions(r.forward))
    assert len(kernel.ys) == 2  # the spike and the potential; nothing between them leaves the registers


def test_what_calls_computed_is_kept_and_weights_get_one_product_at_the_end():
    r = traced(recurrent_lif, *LIF)
    assert r.n_residuals == 1 and "aten.addmm.default" not in calls(r.backward)
    assert [way.kind for way in r.reduced] == ["matmul", "rows"]
    assert r.shared == (None, 0)  # the spikes before each step are those of the output


def test_nothing_is_kept_where_no_gradient_is_wanted():
    r = traced(recurrent_lif, *LIF, needs_grad=False)
    assert r.backward is None and r.n_residuals == 0 and not r.history


def test_what_does_not_change_runs_once():
    def body(v, x, w):
        gate = torch.sigmoid(w @ w)
        return (v @ gate + x,) * 2

    r = traced(body, [(4, 6)], [(4, 6)], [(6, 6)])
    assert calls(r.forward) == ["aten.mm.default"] and len(r.forward.prologue) == 2


def test_a_level_between_two_calls_is_its_own_kernel():
    def body(v, x, w):
        return (torch.relu(torch.relu(v @ w + x) @ w) * 2.0,) * 2

    r = traced(body, [(4, 6)], [(4, 6)], [(6, 6)], needs_grad=False)
    kinds = [type(u).__name__ for u in r.forward.units]
    assert kinds == ["Call", "Region", "Call", "Region"]


def test_shapes_have_kernels_of_their_own():
    def body(v, x, w):
        gain = v.sum(-1, keepdim=True) * 0.1 + 1.0
        return (v * gain.abs() + x * w,) * 2

    r = traced(body, [(4, 6)], [(4, 6)], [(6,)], needs_grad=False)
    assert sorted(u.kernel.meta["shape"] for u in regions(r.forward)) == [(4, 1), (4, 6)]


NEAR_MISSES = {
    "random numbers": (lambda v, x: (torch.rand_like(v) + x.sum(),) * 2, "random numbers"),
    "another dtype": (lambda v, x: ((v.sum() + x).double(),) * 2, "leaves it as float64"),
    "another shape": (lambda v, x: (v.sum(0) + x.sum(0),) * 2, r"leaves it as float32\[6\]"),
    "a size that depends on numbers": (lambda v, x: (v + x.nonzero().float().sum(),) * 2, "cannot be traced alone"),
    "a constant of its own": (lambda v, x: (v.sum() * torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0]) + x,) * 2, "constant"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name):
    body, reason = NEAR_MISSES[name]
    with pytest.raises(Reject, match=reason):
        traced(body, [(4, 6)], [(4, 6)], [])


class Normalised(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(5)

    def forward(self, a):
        v, out = torch.zeros(3, 5), []
        for t in range(a.shape[0]):
            h = F.batch_norm(
                v * 0.5 + a[t],
                self.norm.running_mean,
                self.norm.running_var,
                self.norm.weight,
                self.norm.bias,
                True,
                0.2,
            )
            v = h - Spike.apply(h - 1.0)
            out.append(v)
        return torch.stack(out)


def test_running_statistics_become_states():
    captured = rerolled(Normalised(), x(6, 3, 5))

    def carry_all(gm):
        for call, loop in captured.loops():
            carry_statistics(gm, call, loop)

    captured.check(carry_all, rtol=1e-6)
    ((_, loop),) = captured.loops()
    assert len(loop.carries) == 3 and F.batch_norm not in {n.target for n in loop.body.graph.nodes}
    assert captured.targets().count("copy_") == 2


def test_near_miss_statistics_that_the_step_reads():
    class Peeking(Normalised):
        def forward(self, a):
            v, out = torch.zeros(3, 5), []
            for t in range(a.shape[0]):
                v = F.batch_norm(v * 0.5 + a[t], self.norm.running_mean, self.norm.running_var, training=True)
                v = v + self.norm.running_mean
                out.append(v)
            return torch.stack(out)

    captured = rerolled(Peeking(), x(6, 3, 5))
    ((call, loop),) = captured.loops()
    with pytest.raises(Reject, match="more than once"):
        carry_statistics(captured.gm, call, loop)
