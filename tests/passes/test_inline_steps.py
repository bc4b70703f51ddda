"""A step under `torch.compiler.nested_compile_region` is a step of a loop like any other."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from snn_compile.backend import snn
from snn_compile.explain import explain
from snn_compile.passes.inline_steps import inline_steps
from snn_compile.surrogate import ATan


class Step(nn.Module):
    """Two layers of LIF neurons; `view` puts views into the step."""

    def __init__(self, view: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fire, self.view = nn.Linear(5, 8), nn.Linear(8, 3), ATan(), view

    def lif(self, x, v):
        h = v + (x - v) / 2.0
        s = self.fire(h - 1.0)
        return s, h * (1.0 - s)

    def forward(self, x, v1, v2):
        s, v1 = self.lif(self.fc1(x), v1)
        if self.view:
            s = s.view(-1, 2, 4).transpose(1, 2).flatten(1)
        s, v2 = self.lif(self.fc2(s) * 8, v2)
        return s, v1, v2


class Net(nn.Module):
    def __init__(self, step: nn.Module, steps: int = 6) -> None:
        super().__init__()
        self.step, self.steps = step, steps

    def forward(self, x):
        v1, v2 = x.new_zeros(x.shape[1], 8), x.new_zeros(x.shape[1], 3)
        spikes = []
        for t in range(self.steps):
            s, v1, v2 = self.step(x[t], v1, v2)
            spikes.append(s)
        return torch.stack(spikes)


@pytest.fixture
def region(monkeypatch):
    monkeypatch.setattr(Step, "forward", torch.compiler.nested_compile_region(Step.forward))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("view", [True, False])
def test_is_the_loop_that_it_was(view, training, region, fresh):
    net, x = Net(Step(view)), torch.randn(6, 4, 5) * 3
    leaves = [x.requires_grad_(), *net.parameters()] if training else []
    with torch.set_grad_enabled(training):
        got = torch.compile(net, backend=snn, options={"strict": True})(x)
        assert counters["snn_compile"]["recurrences_lowered"] == 2 and counters["snn_compile"]["ops_time_batched"] >= 2
        expected = net(x)
    torch.testing.assert_close(got, expected)
    assert expected.any()
    weights = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
    if training:
        for a, b in zip(torch.autograd.grad(expected, leaves, weights), torch.autograd.grad(got, leaves, weights), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_places_are_those_of_the_step(region, fresh):
    found = explain(Net(Step()))(torch.randn(6, 4, 5))
    assert len(found.recurrences) == 2 and "test_inline_steps.py" in str(found)


def inlined(net: nn.Module, *inputs: torch.Tensor) -> list[int]:
    counts = []

    def backend(gm, examples):
        counts.append(inline_steps(gm))
        return gm

    torch.testing.assert_close(torch.compile(net, backend=backend)(*inputs), net(*inputs))
    return counts


def test_without_other_passes(region, fresh):
    with torch.no_grad():
        assert inlined(Net(Step()), torch.randn(6, 4, 5)) >= [5]


def test_layers_stay_regions(fresh):
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 5)

        @torch.compiler.nested_compile_region
        def forward(self, x):
            return torch.relu(self.fc(x))

    with torch.no_grad():
        assert inlined(nn.Sequential(*(Layer() for _ in range(4))), torch.randn(3, 5)) == [0]


def test_one_call_stays_a_region(region, fresh):
    with torch.no_grad():
        assert inlined(Net(Step(), steps=1), torch.randn(6, 4, 5)) == [0]
