"""Independent recurrences over one series are one kernel, with the values and gradients that they had."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import snn_compile
from snn_compile.config import Config
from snn_compile.pipeline import run_pipeline
from tests.passes.capture import Captured, Spike, capture, x


def lif(a, tau=0.5, v=None):
    v, out = torch.zeros_like(a[0]) if v is None else v, []
    for t in range(a.shape[0]):
        v = tau * v + a[t]
        s = Spike.apply(v - 1.0)
        v = v * (1.0 - s)
        out.append(s)
    return torch.stack(out)


def trace(a, decay=0.9):
    r, out = torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        r = decay * r + (1.0 - decay) * a[t]
        out.append(r)
    return torch.stack(out)


def gated(a, gate):
    r, out = torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        r = r * gate[t] + a[t]
        out.append(r)
    return torch.stack(out)


def backwards(a):
    v, out = torch.zeros_like(a[0]), []
    for t in reversed(range(a.shape[0])):
        v = 0.7 * v + a[t]
        out.append(v)
    return torch.stack(out[::-1])


def fuse(function, *inputs, rewrite=Captured.check):
    """How many recurrences were fused away, the graph, and the recurrences that are left; all values are compared."""
    counters.clear()
    captured = capture(function, *inputs)
    _, report = rewrite(captured, lambda gm: run_pipeline(gm, Config(strict=True)))
    assert report.changed
    return counters["snn_compile"]["recurrences_fused"], captured, report.recurrences


def unchecked(captured, rewrite):
    return rewrite(captured.gm)


# ------------------------------------------------------------------------------------------------------------ what fuses


def two_populations(a):
    v = u = torch.zeros_like(a[0])
    spikes, others = [], []
    for t in range(a.shape[0]):
        v = 0.5 * v + a[t]
        s = Spike.apply(v - 1.0)
        v = v * (1.0 - s)
        u = 0.9 * u + a[t]
        z = Spike.apply(u - 1.0)
        u = u - z
        spikes.append(s)
        others.append(z)
    return torch.stack(spikes), torch.stack(others)


def heads(a, w):
    states, outs = [torch.zeros(a.shape[1], w.shape[0]) for _ in range(3)], [[], [], []]
    for t in range(a.shape[0]):
        current = F.linear(a[t], w)
        for i, decay in enumerate((0.5, 0.7, 0.9)):
            states[i] = decay * states[i] + current
            outs[i].append(Spike.apply(states[i] - 1.0))
    return tuple(torch.stack(o) for o in outs)


def last_state_and_total(a):
    r, total = torch.zeros_like(a[0]), 0.0
    v = torch.zeros_like(a[0])
    for t in range(a.shape[0]):
        r = 0.9 * r + a[t]
        v = 0.5 * v + a[t]
        s = Spike.apply(v - 1.0)
        v = v * (1.0 - s)
        total = total + s
    return total, r


def spikes_as_booleans(a):
    v, out = torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        v = torch.where(v > 1.0, a[t], 0.5 * v + a[t])
        out.append(v > 1.0)
    return trace(a), torch.stack(out)


def without_gradients(a):
    r = torch.zeros_like(a[0])
    s = lif(a)
    with torch.no_grad():
        for t in range(a.shape[0]):
            r = 0.9 * r + a[t]
    return s, r


def read_between(a, w):
    s = lif(a)
    y = F.linear(s, w)
    return y, trace(a)


def made_between(a, w):
    s = lif(a)
    gate = torch.sigmoid(F.linear(a, w))
    return s, gated(a, gate)


def of_one_view(a):
    b, c = a.transpose(0, 1), a.transpose(0, 1)
    return lif(b), trace(c)


def sized(*shape, dtype=torch.float32):
    return x(*shape).detach().to(dtype).requires_grad_()


WEIGHT = torch.linspace(-0.4, 0.5, 25).view(5, 5).requires_grad_()
DECAY = torch.linspace(0.3, 0.9, 5).requires_grad_()

FUSED = {
    "two populations in one loop": (1, two_populations, x()),
    "two loops": (1, lambda a: (lif(a, 0.5), lif(a, 0.9)), x()),
    "a neuron and a trace": (1, lambda a: (lif(a), trace(a)), x()),
    "three heads of a layer": (2, heads, x(), WEIGHT),
    "results that are no series": (1, last_state_and_total, x()),
    "results of other dtypes": (1, spikes_as_booleans, x()),
    "without gradients": (1, lambda a: (lif(a), trace(a)), x().detach()),
    "one detached": (1, lambda a: (lif(a), trace(a.detach())), x()),
    "the first detached": (1, lambda a: (trace(a.detach()), lif(a)), x()),
    "one under no_grad": (1, without_gradients, x()),
    "both backwards": (1, lambda a: (backwards(a), backwards(a) * 2.0), x()),
    "a gradient comes to one only": (1, lambda a: (lif(a), trace(a).detach()), x()),
    "one has no result with a gradient": (1, lambda a: (lif(a), trace(a) > 0.5), x()),
    "one with a series of its own": (1, lambda a, g: (lif(a), gated(a, g)), x(), torch.rand(6, 3, 5)),
    "one parameter for both": (1, lambda a, d: (lif(a, d), trace(a, d)), x(), DECAY),
    "states from outside": (1, lambda a, v: (lif(a, 0.5, v), trace(a)), x(), torch.rand(3, 5).requires_grad_()),
    "the first's result is read before the second": (1, read_between, x(), WEIGHT),
    "an operand is made between": (1, made_between, x(), WEIGHT),
    "views made twice": (1, of_one_view, x(3, 6, 5)),
    "bfloat16": (1, lambda a: (lif(a), trace(a)), sized(7, 3, 5, dtype=torch.bfloat16).detach()),
    "half": (1, lambda a: (lif(a), trace(a)), sized(7, 3, 5, dtype=torch.float16).detach()),
    "double": (1, lambda a: (lif(a), trace(a)), sized(7, 3, 5, dtype=torch.float64)),
    "odd sizes": (1, lambda a: (lif(a), trace(a)), x(5, 3, 1, 17)),
    "two steps of one lane": (1, two_populations, x(2, 1)),
    "images in channels-last": (
        1,
        lambda a: (lif(a), trace(a)),
        torch.randn(4, 2, 3, 5, 5).to(memory_format=torch.channels_last_3d).requires_grad_(),
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_one_kernel(name):
    wanted, function, *inputs = FUSED[name]
    count, _, recurrences = fuse(function, *inputs)
    assert count == wanted and len(recurrences) == 1


def test_gradients_of_a_common_series_are_added_once():
    _, _, (recurrence,) = fuse(lambda a: (lif(a, 0.5), lif(a, 0.9), trace(a)), x())
    assert len(recurrence.xs) == 1 and len(recurrence.carries) == 3
    (gradient,) = recurrence.backward.graph.output_node().args[0][-1:]
    assert [n.target for n in (gradient, gradient.args[0])] == [torch.ops.aten.add.Tensor] * 2


@pytest.mark.parametrize("name", ["one detached", "one under no_grad", "a gradient comes to one only"])
def test_what_needs_no_gradient_stays_out_of_backward(name):
    _, _, (fused,) = fuse(*FUSED[name][1:])
    _, _, (alone,) = fuse(lambda a: lif(a), x())
    assert [c.differentiable for c in fused.carries] == [True, False]
    assert [y.differentiable for y in fused.ys] in ([True, False], [True])
    assert len(fused.xs) == 1 and fused.xs[0].needs_grad
    ops = [[n.target for n in r.backward.graph.nodes if n.op == "call_function"] for r in (fused, alone)]
    assert ops[0] == ops[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_once(dtype):
    """Nearer to the gradient of float32 than eager's, which rounds after every op."""

    def gradient(function, a):
        a = a.detach().requires_grad_()
        outputs = function(a)
        return torch.autograd.grad([o.float().square().sum() for o in outputs], a)[0].float()

    def function(a):
        return trace(a), trace(a, 0.5)

    a = sized(7, 3, 5, dtype=dtype)
    _, captured, _ = fuse(function, a, rewrite=unchecked)
    exact = gradient(function, a.float())
    errors = [(gradient(f, a) - exact).abs().max() for f in (captured.gm, function)]
    assert errors[0] <= errors[1]


def test_a_cotangent_of_one_alone():
    function, inputs = (lambda a, d: (lif(a, 0.5), trace(a, d))), (x(), DECAY)
    expected = torch.autograd.grad(function(*inputs)[1].square().sum(), inputs)
    _, captured, _ = fuse(function, *inputs)
    found = torch.autograd.grad(captured.gm(*inputs)[1].square().sum(), inputs)
    torch.testing.assert_close(found, expected)


def test_compiled():
    """Through AOTAutograd and Inductor."""
    a, w = x(), WEIGHT.detach().clone().requires_grad_()
    compiled = torch.compile(heads, backend="snn", options={"strict": True})
    found, expected = compiled(a, w), heads(a, w)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    gradients = [torch.autograd.grad(sum(o.square().sum() for o in outs), (a, w)) for outs in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_explain_lists_what_was_fused():
    found = snn_compile.explain(lambda a: (lif(a), trace(a)))(x())
    assert len(found.recurrences) == 1
    assert "of 2 recurrences over one series" in str(found) and "loop_1" in str(found)


# ------------------------------------------------------------------------------------------------------- what does not


def smaller(a):
    r = torch.zeros(2, 3, 5)
    for t in range(a.shape[0]):
        r = 0.9 * r + a[t]
    return lif(a), r


def dependent(a):
    s = lif(a)
    return s, gated(a, s.cumsum(0) * 0.1)


def fed_by_the_first(a):
    s = lif(a)
    return gated(a, s)


def written_between(a, b):
    s = lif(b)
    b.add_(1.0)
    return s, trace(b) + a[0]


def draws_on_both_sides(a):
    s = lif(a)
    dropped = F.dropout(s, 0.5)
    gate = F.dropout(a, 0.5)
    return dropped, gated(a, gate)


def stretched(a, b):
    """Both over lanes of [3, 5]; what they share is one number a step."""
    c = b.view(-1, 1, 1)
    return gated(a, c), gated(a * 2.0, c)


NEAR_MISSES = {
    "no common series": (lambda a, b: (lif(a), trace(b)), x(), x() * 2),
    "different values of one tensor": (lambda a: (lif(a), trace(a * 2.0)), x()),
    "other slices of one tensor": (lambda a: (lif(a[:3]), trace(a[3:])), x()),
    "another length": (lambda a: (lif(a), trace(a[:4])), x()),
    "another shape": (smaller, x()),
    "a common series smaller than the lanes": (stretched, x(), torch.rand(6)),
    "one backwards": (lambda a: (lif(a), backwards(a)), x()),
    "depends on the other": (fed_by_the_first, x()),
    "depends on the other through another op": (dependent, x()),
    "a write between": (written_between, x(), torch.rand(6, 3, 5)),
    "backward would keep a series for it": (lambda a, g: (lif(a), gated(a.detach(), g)), x(), torch.rand(6, 3, 5)),
    "backward would keep a state for it": (lambda a, v: (trace(a), lif(a.detach(), 0.5, v)), x(), torch.rand(3, 5)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name):
    function, *inputs = NEAR_MISSES[name]
    count, _, recurrences = fuse(function, *inputs)
    assert count == 0 and len(recurrences) == 2


@pytest.mark.parametrize(("inputs", "wanted"), [(x().detach(), [2] * 5), (x(), [8, 2])])
def test_no_more_states_than_gain(inputs, wanted):
    _, _, recurrences = fuse(lambda a: tuple(trace(a, 0.1 * i) for i in range(10)), inputs)
    assert [len(r.carries) for r in recurrences] == wanted


def test_near_miss_random_draws_keep_their_order():
    count, _, recurrences = fuse(draws_on_both_sides, x(), rewrite=unchecked)
    assert count == 0 and len(recurrences) == 2


def test_one_that_cannot_be_a_kernel_spoils_no_other():
    def function(a):
        r = torch.zeros_like(a[0])
        for t in range(a.shape[0]):
            r = torch.special.bessel_j0(r) + a[t]
        return lif(a), r

    count, _, recurrences = fuse(function, x().detach())
    assert count == 0 and len(recurrences) == 1
