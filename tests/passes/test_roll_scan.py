"""`torch._higher_order_ops.scan` is a loop as it stands: the same kernel as the plain loop, traced once."""

import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch._higher_order_ops.scan import scan
from torch.utils._pytree import tree_leaves

from snn_compile import explain, functional, neuron
from snn_compile.backend import listeners
from snn_compile.config import Config
from snn_compile.errors import Rejection
from snn_compile.passes.roll_scan import roll_scans
from snn_compile.pipeline import Report, run_pipeline
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
    loops, rejections, count = roll_scans(captured.gm, lambda loop: None)
    after, gradients_after, _ = captured.run()
    # (the gradients of a graph's own scan are wrong in torch 2.11: that of the plain loop is what counts)
    results = by_loop(a, w, v)
    weights = [torch.linspace(0.5, 1.5, r.numel()).view(r.shape) for r in results]
    torch.testing.assert_close(gradients_after, list(torch.autograd.grad(results, [a], weights)), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert [loop.length for loop in loops] == [shape[0]] and count == 1 and not rejections
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


# ------------------------------------------------------------------------------------------------------- one for all lengths

# (with numbers that are multiples of 1/8 sums have no rounding, in whatever order a library adds them up)
W1, W2 = (torch.randint(-8, 9, size, generator=torch.Generator().manual_seed(0)) / 8 for size in ((7, 5), (4, 7)))


def series(steps: int) -> torch.Tensor:
    return torch.randint(-8, 17, (steps, 3, 5), generator=torch.Generator().manual_seed(steps)) / 8


def plain_loop(step, init, xs):
    """What a scan means."""
    carry, ys = init, []
    for step_input in xs.unbind(0):
        carry, y = step(carry, step_input)
        ys.append(y)
    return carry, torch.stack(ys)


def neuron_step(v, a):
    return lif(v, a, 1.5)


def state_and_spikes(run, a):
    return run(neuron_step, torch.zeros_like(a[0]), a)


def spikes_alone(run, a):
    return run(neuron_step, torch.zeros(3, 5), a)[1]


def state_alone(run, a):
    return run(neuron_step, torch.zeros(3, 5), a)[0]


def several_states(run, a):
    def step(carry, a):
        v, current, count = carry
        current = 0.5 * current + a
        v, s = lif(v, current, 1.5)
        return [v, current, count + s], s

    (v, _, count), s = run(step, [torch.zeros(3, 5) for _ in range(3)], a)
    return v, count, s


def two_layers(run, a):
    def step(carry, a):
        u, v = carry
        u, s = lif(u, F.linear(a, W1), 1.5)
        v, z = lif(v, F.linear(s, W2), 1.5)
        return [u, v], z

    return run(step, [torch.zeros(3, 7), torch.zeros(3, 4)], a)[1]


def two_scans_and_a_residual(run, a):
    s = run(neuron_step, torch.zeros(3, 5), a)[1] + a
    return run(neuron_step, torch.zeros(3, 4), F.linear(F.linear(s, W1), W2))[1]


def a_state_without_a_series(run, a):
    def step(carry, a):
        v, r = carry
        v, s = lif(v, a, 1.5)
        return [v, r * 0.5 + 0.25], s

    (_, r), s = run(step, [torch.zeros(3, 5), torch.zeros(3, 5)], a)
    return s, r


def a_recurrent_layer(run, a):
    weight = torch.eye(5) * 0.25

    def step(carry, a):
        v, s = carry
        v, s = lif(v, a + F.linear(s, weight), 1.5)
        return [v, s], s.clone()

    return run(step, [torch.zeros(3, 5), torch.zeros(3, 5)], a)[1]


PROGRAMS = (
    state_and_spikes,
    spikes_alone,
    state_alone,
    several_states,
    two_layers,
    two_scans_and_a_residual,
    a_state_without_a_series,
    a_recurrent_layer,
)


def results(function, a, is_marked=False):
    """Results and the gradient of `a`; time is declared dynamic where `is_marked`."""
    leaf = a.clone().requires_grad_()
    if is_marked:
        torch._dynamo.mark_dynamic(leaf, 0)
    outputs = tree_leaves(function(leaf))
    wanted = [o for o in outputs if o.requires_grad]
    weights = [torch.linspace(0.5, 1.5, o.numel()).view(o.shape) for o in wanted]
    return outputs, torch.autograd.grad(wanted, leaf, weights)[0]


def check_lengths(function, plain, lengths, is_marked=False):
    for steps in lengths:
        expected, expected_gradient = results(plain, series(steps))
        found, gradient = results(function, series(steps), is_marked and steps > 1)
        assert all(torch.equal(e, f) for e, f in zip(expected, found, strict=True))
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_one_kernel_for_all_lengths(program):
    check_lengths(compiled(partial(program, scan)), partial(program, plain_loop), (6, 11, 2, 40), is_marked=True)
    assert counters["stats"]["unique_graphs"] == 1 and counters["aot_autograd"]["total"] == 1
    assert counters["snn_compile"]["recurrences_lowered"] + counters["snn_compile"]["recurrences_stepped"] > 0


@pytest.mark.parametrize("program", (several_states, two_layers), ids=lambda p: p.__name__)
def test_a_second_length_is_the_last_compilation(program):
    function = compiled(partial(program, scan))
    check_lengths(function, partial(program, plain_loop), (6, 11, 2, 40, 7, 33))
    assert counters["stats"]["unique_graphs"] == 2
    check_lengths(function, partial(program, plain_loop), (1, 9))  # (one step is none of "all lengths": it has no loop)
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("options", ({"time_chunk": 4}, {"batch_time": False}), ids=str)
def test_options_for_lengths_that_are_known(options):
    """A loop of unknown length is not cut into stretches; layers whose steps stay apart cannot stay in it."""
    run = torch.compile(partial(two_layers, scan), backend="snn", fullgraph=True, options={"strict": True, **options})
    with torch.no_grad():
        for steps in (9, 6, 13):
            assert torch.equal(run(series(steps)), two_layers(plain_loop, series(steps)))
    assert counters["snn_compile"]["recurrences_lowered"] >= 2


def test_a_batch_norm_before_it():
    norm = nn.BatchNorm1d(5).eval()

    def program(run, a):
        return run(neuron_step, torch.zeros(3, 5), norm(a.flatten(0, 1)).unflatten(0, (-1, 3)))[1]

    function = compiled(partial(program, scan))
    with torch.no_grad():
        for steps in (6, 11, 4):
            a = series(steps)
            torch._dynamo.mark_dynamic(a, 0)
            assert torch.equal(function(a), program(plain_loop, a))
    assert counters["stats"]["unique_graphs"] == 1 and counters["snn_compile"]["producers_fused"] == 1


def test_sizes_that_nobody_reads_are_no_operands():
    captured = capture(partial(state_and_spikes, scan), series(5), dynamic=True)
    (loop,), rejections, count = captured.check(lambda gm: roll_scans(gm, lambda loop: None))
    assert count == 1 and not rejections and isinstance(loop.length, torch.SymInt)
    assert not loop.consts and "over T steps" in str(loop)


def test_reports_say_that_it_is_for_any_length():
    for program, what in ((state_and_spikes, "kernel"), (a_recurrent_layer, "program")):
        a = series(40)
        torch._dynamo.mark_dynamic(a, 0)
        found = explain(partial(program, scan))(a)
        assert "time steps   T, one for any number of them, each " in str(found), what
        assert found.kernels and "from 1 time loop" in str(found)


# ------------------------------------------------------------------------------------------------------------------ gradients


def reads_the_state_before(run, a):
    """The first state wants no gradient, so the step was traced as if its output did not depend on `a`."""
    first = run(neuron_step, torch.zeros(3, 5), a)[1]
    return first, run(lambda v, a: (v * 0.5 + a - v * 0.25, (v * 2).clone()), torch.zeros(3, 5), a)[1]


def delayed_layer(run, a):
    return run(lambda v, a: (v * 0.5 + a - v * 0.25, F.linear(v * 2, W1)), torch.zeros(3, 5), a)[1]


def without_gradient(run, a):
    def step(v, a):
        with torch.no_grad():
            r = torch.relu(v) * 0.5
        return lif(v, a + r, 1.5)

    return run(step, torch.zeros(3, 5), a)[1]


def in_place(run, a):
    def step(v, a):
        h = v * 0.5
        h += a
        s = Spike.apply(h - 0.5)
        return h * (1.0 - s), s.clone()

    return run(step, torch.zeros(3, 5), a)[1]


@pytest.mark.parametrize("program", (reads_the_state_before, delayed_layer, without_gradient, in_place), ids=lambda p: p.__name__)
def test_gradients_are_the_plain_loop_s(program):
    check_lengths(compiled(partial(program, scan)), partial(program, plain_loop), (6,))
    assert counters["snn_compile"]["recurrences_lowered"] >= 1


# ------------------------------------------------------------------------------------------------------------- left to Inductor


def more_than_pointwise_and_short(run, a):
    return run(lambda v, a: (torch.cumsum(v + a, -1), v.clone()), torch.zeros(3, 5), a)


def random_state(run, a):
    return run(lambda v, a: (v * torch.rand_like(v) * 0.0 + a, v.clone()), torch.zeros(3, 5), a)


def test_near_miss_more_than_pointwise_and_short():
    captured = capture(partial(more_than_pointwise_and_short, scan), series(5))
    _, report = captured.check(lambda gm: run_pipeline(gm, Config()))
    assert torch.ops.higher_order.scan not in captured.targets() and not captured.loops()
    assert report.changed and report.rejections and not report.lowered


@pytest.mark.parametrize("program, graphs", ((more_than_pointwise_and_short, 3), (random_state, 4)))
def test_a_refused_scan_runs(program, graphs):
    """Inductor compiles no scan on CPU; an unrolled one is compiled for each length, and one of unknown length is fixed.

    (One that is too short for a program of kernels and calls is not, where its length is unknown.)
    """
    reports: list[Report] = []
    listeners.append(reports.append)
    try:
        check_lengths(compiled(partial(program, scan)), partial(program, plain_loop), (5, 3, 1, 7))
    finally:
        listeners.remove(reports.append)
    assert len(reports) == graphs and all(r.changed and r.rejections for r in reports) and not reports[0].lowered


def test_near_miss_refused_and_of_unknown_length():
    captured = capture(partial(state_and_spikes, scan), x(5), dynamic=True)
    refusal = Rejection("no")
    with torch._dynamo.config.patch(assume_static_by_default=False):  # (as `dynamic=True` does while it compiles)
        loops, rejections, count = captured.check(lambda gm: roll_scans(gm, lambda loop: refusal))
    assert not loops and rejections == [refusal] and count == 0 and torch.ops.higher_order.scan in captured.targets()


def test_near_miss_a_part_of_unknown_length_that_stays():
    """What cannot be one call over all steps cannot be unrolled: the whole graph stays as it was, and nothing is counted."""

    def program(a):
        return scan(lambda v, a: neuron_step(v, torch.einsum("bi,oi->bo", a, W1)), torch.zeros(3, 7), a)[1]

    captured = capture(program, x(5), dynamic=True)
    with torch._dynamo.config.patch(assume_static_by_default=False):
        _, report = captured.check(lambda gm: run_pipeline(gm, Config()))
    assert torch.ops.higher_order.scan in captured.targets() and not report.changed and not report.lowered
    assert any("whose number is not known" in r.reason for r in report.rejections)
    assert not counters["snn_compile"]["recurrences_lowered"]
