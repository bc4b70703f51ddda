"""Autocast that is switched within the compiled function: what is moved, copied and batched is cast as in eager."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._higher_order_ops.scan import scan
from torch.utils.checkpoint import checkpoint

from snn_compile.backend import snn
from snn_compile.lowering.cpp import compiler
from snn_compile.passes.autocast_regions import name_regions, regions, restore_regions
from tests.passes.capture import Spike, capture

BF16 = torch.bfloat16
N = 6


def on(dtype=BF16):
    return torch.autocast("cpu", dtype)


def off():
    return torch.autocast("cpu", enabled=False)


# --------------------------------------------------------------------------------------------------------- the pass alone


def switches_twice(a, w):
    with on():
        y = F.linear(a, w)
        with off():
            z = F.linear(a, w) + y.float()
        y = F.linear(y, w)
    return (y, z, F.linear(z, w)), y


def test_regions_are_properties_and_regions_again():
    captured = capture(switches_twice, torch.randn(3, N), torch.randn(N, N))

    def rewrite(gm):
        count = len(gm.graph.nodes)
        assert name_regions(gm.graph) and len(gm.graph.nodes) == count - 4
        where = [[(dtype, enabled) for _, dtype, enabled, _ in regions(n)] for n in gm.graph.nodes if n.target is F.linear]
        assert where == [[(BF16, True)], [(BF16, True), (None, False)], [(BF16, True)], []]
        restore_regions(gm.graph)
        assert len(gm.graph.nodes) == count

    captured.check(rewrite)


def test_what_ends_elsewhere_stays():
    gm = capture(switches_twice, torch.randn(3, N), torch.randn(N, N)).gm
    last = [n for n in gm.graph.nodes if n.target is torch.amp.autocast_mode._exit_autocast][-1]
    gm.graph.erase_node(last)
    before = str(gm.graph)
    assert not name_regions(gm.graph) and str(gm.graph) == before


# ------------------------------------------------------------------------------------------------------------ in networks


def neuron(current, back=None):
    """A LIF over `current(a, t, w)`, and over its own spikes, `back(s, w)`."""

    def network(a, w):
        v = s = torch.zeros_like(a[0])
        out = []
        for t in range(a.shape[0]):
            v = v + (current(a, t, w) + (0.0 if back is None else back(s, w)) - v) / 2.0
            s = Spike.apply(v - 0.1)
            v = v * (1.0 - s)
            out.append(s)
        return torch.stack(out)

    return network


def within(manager, function):
    def inside(*args):
        with manager():
            return function(*args)

    return inside


def linear(a, t, w):
    return F.linear(a[t], w)


def both(a, t, w):
    return F.linear(a[t], w) + within(off, linear)(a, t, w)


def invariant(a, t, w):
    return a[t] @ within(on, torch.matmul)(w, w).float()


def attention(a, t, w):
    """Layers that only `torch.vmap` can batch, in two regions."""
    scores = torch.einsum("bi,bj->ij", a[t], a[t])
    return within(off, torch.einsum)("bi,ij->bj", a[t], scores.float() * w)


def feedback(s, w):
    return F.linear(s, w)


def scanned(current):
    def network(a, w):
        def step(v, now):
            v = v + (current(now[None], 0, w) - v).float() / 2.0
            s = Spike.apply(v - 0.1)
            return v * (1.0 - s), s.clone()

        return scan(step, torch.zeros_like(a[0]), a)[1]

    return network


NETWORKS = {
    "a layer within": (neuron(within(on, linear)), 8, {"ops_time_batched": 1}),
    "layers in and out": (within(on, neuron(both)), 8, {"ops_time_batched": 2}),
    "a neuron out of it": (within(on, neuron(lambda a, t, w: within(off, both)(a, t, w).float())), 8, {"ops_time_batched": 2}),
    "the same for all steps": (neuron(invariant), 8, {"ops_hoisted": 1}),
    "by vmap": (within(on, neuron(attention)), 8, {"ops_time_batched": 3}),
    "layers alone": (lambda a, w: torch.stack([within(on, linear)(a, t, w) for t in range(len(a))]), 8, {}),
    "feedback within": (neuron(lambda a, t, w: a[t], within(on, feedback)), 40, {"recurrences_stepped": 1}),
    "feedback out of it": (within(on, neuron(linear, within(off, feedback))), 40, {"recurrences_stepped": 1}),
    "within a scan": (scanned(within(on, linear)), 8, {"recurrences_lowered": 1, "ops_time_batched": 1}),
    "a scan within": (within(on, scanned(both)), 8, {"recurrences_lowered": 1, "ops_time_batched": 2}),
    "in a checkpoint": (
        within(on, lambda a, w: checkpoint(neuron(linear), a, w, use_reentrant=False)),
        8,
        {"recurrences_lowered": 1},
    ),
}


@pytest.mark.skipif(compiler.missing() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("around", [contextlib.nullcontext, on], ids=["", "all under autocast"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(fresh, name, around):
    network, steps, expected = NETWORKS[name]
    values = torch.randn(steps, 3, N), torch.randn(N, N)

    def run(function):
        a, w = (v.clone().requires_grad_() for v in values)
        with around():
            y = function(a, w)
        return y, *torch.autograd.grad((y.float() * y.detach().float().cos()).sum(), (a, w))

    eager, ours = run(network), run(torch.compile(network, backend=snn))
    assert ours[0].dtype == eager[0].dtype and torch.equal(ours[0], eager[0]) and eager[0].float().std() > 0
    for a, b in zip(eager[1:], ours[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * float(a.abs().max()))
    for counter, count in expected.items():
        assert counters["snn_compile"][counter] >= count, counter
