"""`torch._higher_order_ops.scan` is a loop as it stands: the same kernel as the plain loop, traced once."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch._higher_order_ops.scan import scan

from snn_compile import functional, neuron
from snn_compile.config import Config
from snn_compile.passes.roll_scan import roll_scans
from snn_compile.pipeline import run_pipeline
from tests.passes.capture import Spike, capture, x

pytestmark = pytest.mark.usefixtures("fresh")


def lif(v, a, w):
    h = v + (a * w - v) / 2.0
    s = Spike.apply(h - 0.5)
    return h * (1.0 - s), s.clone()


def by_scan(a, w, v, **kwargs):
    last, spikes = scan(lambda v, a: lif(v, a, w), v, a, **kwargs)
    return spikes, last


def by_loop(a, w, v):
    out = []
    for t in range(a.shape[0]):
        v, s = lif(v, a[t], w)
        out.append(s)
    return torch.stack(out), v


def gradients(function, *inputs):
    leaves = [i.detach().clone().requires_grad_() for i in inputs]
    spikes, last = function(*leaves)
    (spikes * torch.linspace(0.5, 1.5, spikes.numel()).view(spikes.shape)).sum().backward(retain_graph=True)
    last.square().sum().backward()
    return [spikes, last, *(leaf.grad for leaf in leaves)]


def compiled(function):
    return torch.compile(function, backend="snn", fullgraph=True, options={"strict": True})


@pytest.mark.parametrize("shape", ((7, 3, 5), (2, 4), (33, 2, 1, 3)))
def test_the_pass_keeps_the_meaning(shape):
    a, w, v = x(*shape), torch.rand(shape[1:]), torch.zeros(shape[1:])
    captured = capture(by_scan, a, w, v)
    before, _, _ = captured.run()
    loops, rejections = roll_scans(captured.gm, lambda loop: None)
    after, gradients_after, _ = captured.run()
    # (the gradients of a graph's own scan are wrong in torch 2.11: that of the plain loop is what counts)
    results = by_loop(a, w, v)
    weights = [torch.linspace(0.5, 1.5, r.numel()).view(r.shape) for r in results]
    torch.testing.assert_close(gradients_after, list(torch.autograd.grad(results, [a], weights)), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert [loop.length for loop in loops] == [shape[0]] and not rejections
    assert torch.ops.higher_order.scan not in captured.targets() and len(captured.loops()) == 1


def test_equals_the_plain_loop():
    given = x(9, 3, 5).detach(), torch.rand(5) + 0.5, torch.rand(3, 5)
    expected, found = gradients(by_loop, *given), gradients(compiled(by_scan), *given)
    for a, b in zip(expected[:2], found[:2], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(expected[2:], found[2:], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    assert counters["snn_compile"]["recurrences_lowered"] == 1


@pytest.mark.parametrize("kwargs", ({"reverse": True}, {"dim": 1}), ids=str)
def test_other_directions(kwargs):
    a, w, v = torch.randn(6, 6, 5), torch.rand(5) + 0.5, torch.rand(6, 5)
    time_first = a.flip(0) if "reverse" in kwargs else a.movedim(1, 0)
    expected = by_loop(time_first, w, v)
    found = compiled(lambda *given: by_scan(*given, **kwargs))(a, w, v)
    spikes = found[0].flip(0) if "reverse" in kwargs else found[0]
    if spikes.shape == expected[0].shape and torch.equal(found[1], expected[1]):
        assert torch.equal(spikes, expected[0]) or torch.equal(spikes.movedim(1, 0), expected[0])
    assert torch.equal(found[1], expected[1]) and counters["snn_compile"]["recurrences_lowered"] == 1


def test_a_layer_in_the_step_runs_over_all_steps():
    weight = torch.randn(5, 4)

    def network(a, v):
        def step(v, a):
            v, s = lif(v, F.linear(a, weight), 1.0)
            return v, s

        return scan(step, v, a)[1]

    a, v = torch.randn(8, 3, 4), torch.zeros(3, 5)
    expected = by_loop(torch.stack([F.linear(step, weight) for step in a]), torch.ones(()), v)[0]
    assert torch.equal(compiled(network)(a, v), expected)
    assert counters["snn_compile"]["ops_time_batched"] == 1


def test_a_thousand_steps_cost_one_trace():
    start = time.perf_counter()
    found = gradients(compiled(by_scan), torch.randn(1000, 64), torch.rand(64) + 0.5, torch.zeros(64))
    assert time.perf_counter() - start < 30  # (0.8 s on two idle cores; unrolled, the trace alone takes longer than this)
    assert found[0].shape == (1000, 64) and counters["snn_compile"]["recurrences_lowered"] == 1


@pytest.mark.parametrize("make", (neuron.LIFNode, neuron.ParametricLIFNode, neuron.CUBALIFNode, neuron.IzhikevichNode))
def test_the_library_offers_it(make):
    nodes = [make() for _ in range(3)]
    functional.set_time_loop(nn.ModuleList(nodes[1:]), "scan")
    sequence = torch.randn(12, 3, 7)
    outputs = []
    for node, run in zip(nodes, (nodes[0], nodes[1], torch.compile(nodes[2], backend="snn")), strict=True):
        node.step_mode = "m"
        first = run(sequence)
        outputs.append([first, run(sequence), node.v])  # the second call starts from the first one's states
    for eager, scanned, both in zip(*outputs, strict=True):
        assert torch.equal(eager, scanned) and torch.equal(eager, both)
    assert counters["snn_compile"]["recurrences_lowered"] >= 1
    with pytest.raises(ValueError, match="time_loop must be one of 'python', 'scan', but is 'while'"):
        functional.set_time_loop(nodes[0], "while")


# (Inductor of torch 2.13 cannot compile a scan itself, so what is left alone is looked at and run, not compiled)
def more_than_pointwise_and_short(a):
    return scan(lambda v, a: (torch.softmax(v + a, -1), v.clone()), torch.zeros(3), a)


def test_near_miss_more_than_pointwise_and_short():
    captured = capture(more_than_pointwise_and_short, torch.randn(5, 3))
    _, report = captured.check(lambda gm: run_pipeline(gm, Config()))
    assert torch.ops.higher_order.scan in captured.targets() and report.rejections and not report.changed


def test_near_miss_a_length_that_is_not_known():
    captured = capture(lambda a: scan(lambda v, a: (v + a, v.clone()), torch.zeros(3), a), torch.randn(5, 3), dynamic=True)
    loops, rejections = captured.check(lambda gm: roll_scans(gm, lambda loop: None))
    assert not loops and len(rejections) == 1
