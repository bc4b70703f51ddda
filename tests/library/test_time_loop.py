"""`functional.set_time_loop(net, "scan")`: one step is traced, whatever the module, with the plain loop's values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from snn_compile import functional, layer, neuron
from tests.library.modules import states

pytestmark = pytest.mark.usefixtures("fresh")

C = 6


def exact(net: nn.Module) -> nn.Module:
    """With weights whose sums have no rounding, in whatever order a library adds them up."""
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -5, 6)
        parameter.data.floor_().div_(8)
    return net


SCANNED = {
    "elementwise": lambda: layer.ElementWiseRecurrentContainer(neuron.LIFNode(), torch.add, step_mode="m"),
    "elementwise, no neuron": lambda: layer.ElementWiseRecurrentContainer(nn.Sigmoid(), torch.add, step_mode="m"),
    "linear": lambda: layer.LinearRecurrentContainer(neuron.CUBALIFNode(), C, C, step_mode="m"),
    "linear, of a sequence": lambda: layer.LinearRecurrentContainer(
        nn.Sequential(nn.Linear(C, 5), neuron.LIFNode()), C, 5, step_mode="m"
    ),
    "layers": lambda: layer.MultiStepContainer(nn.Linear(C, 5), neuron.IFNode(), nn.Linear(5, 4), neuron.CUBALIFNode()),
    "MPBN, fixed": lambda: neuron.MPBNLIFNode(out_features=C, step_mode="m").eval(),
    "synapse": lambda: layer.SynapseFilter(step_mode="m", learnable=True),
}

#: Their step is more than a function of states.
PLAIN = {
    "MPBN": lambda: neuron.MPBNLIFNode(out_features=C, step_mode="m"),
    "batch norm": lambda: layer.MultiStepContainer(nn.Linear(C, 5), nn.BatchNorm1d(5), neuron.LIFNode()),
    "dropout": lambda: layer.MultiStepContainer(layer.Dropout(), neuron.LIFNode()),
    "nested": lambda: layer.MultiStepContainer(layer.ElementWiseRecurrentContainer(neuron.LIFNode(), torch.add)),
    "stateless": lambda: layer.MultiStepContainer(nn.Linear(C, 5), nn.ReLU()),
}


def uses_scan(net: nn.Module, x: torch.Tensor) -> bool:
    found = []

    def backend(gm, _):
        found.extend(n.target is torch.ops.higher_order.scan for n in gm.graph.nodes)
        return gm

    torch._dynamo.reset()
    torch.compile(net, backend=backend)(x)
    return any(found)


@pytest.mark.parametrize("name", SCANNED)
def test_scans(name):
    nets = [exact(SCANNED[name]())]
    nets += [copy.deepcopy(nets[0]) for _ in range(2)]
    for net in nets[1:]:
        functional.set_time_loop(net, "scan")
    assert uses_scan(copy.deepcopy(nets[1]), torch.zeros(4, 3, C))
    torch._dynamo.reset()
    runs = (nets[0], nets[1], torch.compile(nets[2], backend="snn", options={"step_from": 4, "strict": True}))
    for steps in (6, 9):  # the second call goes on from the first one's states
        x = torch.randint(-8, 17, (steps, 3, C)) / 8
        (expected, *others) = [run(x) for run in runs]
        for found in others:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        for net in nets[1:]:
            torch.testing.assert_close(states(net), states(nets[0]), rtol=1e-6, atol=1e-6)
    assert counters["snn_compile"]["recurrences_lowered"] + counters["snn_compile"]["recurrences_stepped"] > 0


@pytest.mark.parametrize("name", PLAIN)
def test_keeps_the_plain_loop(name):
    net = PLAIN[name]()
    plain = copy.deepcopy(net)
    functional.set_time_loop(net, "scan")
    x = torch.rand(4, 3, C)
    assert not uses_scan(copy.deepcopy(net), x)
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    assert torch.equal(net(x), expected)
    for a, b in zip(plain.buffers(), net.buffers(), strict=True):
        assert torch.equal(a, b)


def test_hooks_are_called():
    net = layer.MultiStepContainer(neuron.LIFNode())
    functional.set_time_loop(net, "scan")
    seen = []
    net[0].register_forward_hook(lambda module, given, made: seen.append(made))
    net(torch.rand(4, 3, C))
    assert len(seen) == 4


def test_a_container_s_gradients():
    net = exact(SCANNED["linear, of a sequence"]())
    scanned = copy.deepcopy(net)
    functional.set_time_loop(scanned, "scan")
    x = torch.randint(-8, 17, (7, 3, C)) / 8
    for run in (net, torch.compile(scanned, backend="snn", options={"step_from": 4, "strict": True})):
        y = run(x)
        (y * torch.linspace(0.5, 1.5, y.numel()).view(y.shape)).sum().backward()
    assert y.any() and not y.all()
    for a, b in zip(net.parameters(), scanned.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)
