"""Products of spikes as sums of rows: the bits of torch's product, or the product itself."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

import snn_compile  # noqa: F401  (registers the backend in a source tree)
from snn_compile.lowering import step_loop, stepped
from snn_compile.lowering.cpp import spike_product
from tests.passes.capture import Spike

SIZES = [(128, 128, 128), (128, 512, 512), (8, 144, 48), (33, 256, 16), (64, 784, 208), (16, 1024, 160)]


def planned(spikes, weight, start=None):
    plan = spike_product.plan(spikes, weight, start)
    if plan is None:
        pytest.skip("this machine's library adds up in an order that no sum of rows gives")
    return plan


def summed(plan, spikes, weight, start=None, pause=None):
    """What the rows add up to, or None where they were not added."""
    out = torch.full((plan.rows, plan.columns), float("nan"))
    tensors = (spikes, weight.contiguous(), start, out)
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    pause = spike_product.Pause() if pause is None else pause
    return out if spike_product.load().sum_rows(ctypes.byref(plan), *pointers, ctypes.byref(pause)) else None


def spikes_of(rows, depth, share):
    torch.manual_seed(int(share * 100))
    return (torch.rand(rows, depth) < share).float()


@pytest.mark.parametrize("is_transposed", [True, False], ids=["weight.t()", "weight"])
@pytest.mark.parametrize("has_start", [False, True], ids=["mm", "addmm"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bits_are_those_of_the_product(size, has_start, is_transposed):
    rows, depth, columns = size
    torch.manual_seed(1)
    weight = torch.randn(columns, depth).t() if is_transposed else torch.randn(depth, columns)
    start = torch.randn(columns) if has_start else None
    plan = planned(torch.zeros(rows, depth), weight, start)
    for share in (0.0, 0.01, 0.2, 0.7, 1.0):
        s = spikes_of(rows, depth, share)
        expected = torch.mm(s, weight) if start is None else torch.addmm(start, s, weight)
        assert torch.equal(summed(plan, s, weight, start), expected), share


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_other_numbers_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        s, w = spikes_of(70, 256, 0.1), torch.randn(96, 256).t()
        assert torch.equal(summed(planned(s, w), s, w), s @ w)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("spikes", "weight", "start"),
    [
        (torch.zeros(3, 64), torch.zeros(64, 64), None),
        (torch.zeros(8, 60), torch.zeros(60, 64), None),
        (torch.zeros(8, 64), torch.zeros(64, 40), None),
        (torch.zeros(8, 64).double(), torch.zeros(64, 64).double(), None),
        (torch.zeros(64, 8).t(), torch.zeros(64, 64), None),
        (torch.zeros(8, 64), torch.zeros(64, 64), torch.zeros(8, 64)),
        (torch.zeros(8, 0), torch.zeros(0, 64), None),
    ],
    ids=["few rows", "depth", "columns", "fp64", "strided", "a start for each row", "no depth"],
)
def test_what_has_no_plan(spikes, weight, start):
    assert spike_product.plan(spikes, weight, start) is None


def test_values_that_are_no_spikes_are_multiplied():
    s, w = spikes_of(8, 64, 0.1), torch.randn(64, 64)
    plan = planned(s, w)
    for value in (0.5, -1.0, float("nan"), float("inf")):
        graded = s.clone()
        graded[7, 63] = value
        assert summed(plan, graded, w) is None


def test_after_too_many_spikes_the_search_pauses_longer_and_longer():
    few, many, w = spikes_of(8, 64, 0.05), spikes_of(8, 64, 0.9), torch.randn(64, 64)
    plan, pause = planned(few, w), spike_product.Pause()
    assert summed(plan, many, w, pause=pause) is not None and (pause.left, pause.length) == (1, 1)
    assert summed(plan, many, w, pause=pause) is None
    assert summed(plan, many, w, pause=pause) is not None and (pause.left, pause.length) == (3, 3)
    for _ in range(3):
        assert summed(plan, few, w, pause=pause) is None
    assert summed(plan, few, w, pause=pause) is not None and (pause.left, pause.length) == (0, 0)


# ------------------------------------------------------------------------------------------ the gradient of the weights


@pytest.mark.parametrize("columns", [256, 272, 320])
@pytest.mark.parametrize("rows", [1024, 2500])
def test_sum_over_the_rows_of_all_steps(rows, columns):
    for share in (0.0, 0.01, 0.08):
        s, g = spikes_of(rows, 48, share), torch.randn(rows, columns)
        expected = (s.double().t() @ g.double()).float()
        torch.testing.assert_close(spike_product.sum_outer(s, g), expected, rtol=1e-5, atol=1e-4)


def test_what_is_no_sum_of_rows():
    s, g = spikes_of(1024, 48, 0.05), torch.randn(1024, 256)
    assert spike_product.sum_outer(s, g) is not None
    graded = s.clone()
    graded[1001, 40] = 0.5  # (not in the sample)
    for a, b in ((graded, g), (s + 1, g), (s.t().contiguous().t(), g), (s, g[:, :64].contiguous()), (s.double(), g.double())):
        assert spike_product.sum_outer(a, b) is None
    for value in (float("nan"), float("inf")):
        g[5, 6] = value
        assert spike_product.sum_outer(s, g) is None
    assert spike_product.sum_outer(spikes_of(1024, 48, 0.5), torch.randn(1024, 256)) is None


# ---------------------------------------------------------------------------------------------------- in a recurrence


class Recurrent(torch.nn.Module):
    def __init__(self, hidden, bias):
        super().__init__()
        self.recurrent = torch.nn.Linear(hidden, hidden, bias=bias)

    def forward(self, x):
        v, s, out = torch.zeros_like(x[0]), torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            h = 0.8 * v + x[t] + self.recurrent(s)
            s = Spike.apply(h - 1.0)
            v = h * (1.0 - s)
            out.append(s)
        return torch.stack(out)


@pytest.fixture
def loops(fresh, monkeypatch):
    """The step loops that ran."""
    found = []
    run = step_loop.StepLoop.run

    def spy(self, *args):
        found.append(self)
        return run(self, *args)

    monkeypatch.setattr(step_loop.StepLoop, "run", spy)
    return found


@pytest.mark.parametrize("bias", [False, True])
def test_recurrence_of_few_spikes(loops, bias):
    net, x = Recurrent(64, bias), torch.randn(40, 16, 64)
    planned(torch.zeros(16, 64), net.recurrent.weight.t(), net.recurrent.bias)
    compiled = torch.compile(net, backend="snn")
    expected = net(x)
    assert 0.01 < expected.mean() < 0.25
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)
        (product,) = loops[-1]._spike_products
        assert product.pause.left == product.pause.length == 0
    got = compiled(x)
    assert torch.equal(got, expected)
    grads = [torch.autograd.grad(y.sum(), list(net.parameters())) for y in (got, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_gradient_of_a_recurrence_of_few_spikes(loops, monkeypatch):
    """Large enough for sums of rows: of states (``s @ w.T``), and of the gradient (``s @ w``)."""
    net, x = Recurrent(256, False), 0.7 * torch.randn(40, 32, 256)
    spans = []
    sum_outer = spike_product.sum_outer
    monkeypatch.setattr(stepped, "sum_outer", lambda a, b: (spans.append(a.shape), sum_outer(a, b))[1])
    got, expected = torch.compile(net, backend="snn")(x), net(x)
    assert 0.005 < expected.mean() < 0.1 and torch.equal(got, expected)
    up = torch.randn_like(x)
    mine, theirs = (torch.autograd.grad(y, net.recurrent.weight, up)[0] for y in (got, expected))
    assert spans
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_recurrence_of_many_spikes(loops):
    net, x = Recurrent(64, False), torch.randn(40, 16, 64) + 1.0
    planned(torch.zeros(16, 64), net.recurrent.weight.t())
    with torch.no_grad():
        expected = net(x)
        assert expected.mean() > 0.4
        assert torch.equal(torch.compile(net, backend="snn")(x), expected)
    (product,) = loops[-1]._spike_products
    assert product.pause.length > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_reach_every_neuron(loops, value):
    net, x = Recurrent(64, False), torch.randn(40, 16, 64)
    compiled = torch.compile(net, backend="snn")
    with torch.no_grad():
        compiled(x)
        net.recurrent.weight[3, 5] = value
        torch.testing.assert_close(compiled(x), net(x), rtol=0, atol=0, equal_nan=True)


def test_a_state_that_is_no_spike_is_multiplied(loops):
    def rate_neurons(x, w):
        h, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            h = torch.tanh(x[t] + F.linear(h, w))
            out.append(h)
        return torch.stack(out)

    x, w = torch.randn(40, 16, 64), torch.randn(64, 64) * 0.1
    compiled = torch.compile(rate_neurons, backend="snn")
    torch.testing.assert_close(compiled(x, w), rate_neurons(x, w), rtol=1e-6, atol=1e-6)
    assert not loops[-1]._spike_products
