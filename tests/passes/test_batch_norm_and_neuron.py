"""A batch norm in training mode and the neuron behind it as one kernel, and convolutions that hand channels-last values on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import snn_compile
from snn_compile.lowering import by_channel
from tests.passes.capture import Spike


@pytest.fixture
def small(fresh, monkeypatch):
    """Small steps, too, are run by channel."""
    monkeypatch.setattr(by_channel, "FEWEST_VALUES", 1)


class Layer(nn.Module):
    """Convolution, batch norm, neuron, pooling; `step` is what differs."""

    def __init__(self, channels=2, out=18, **options):
        super().__init__()
        self.conv, self.other = (nn.Conv2d(channels, out, 3, padding=1) for _ in range(2))
        self.norm, self.second = nn.BatchNorm2d(out, momentum=0.3), nn.BatchNorm2d(out)
        for norm in (self.norm, self.second):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.uniform_(norm.bias, 0.0, 0.5)
        self.tau = nn.Parameter(torch.tensor(0.5))
        self.options = options

    def current(self, x):
        return self.norm(self.conv(x))

    def neuron(self, v, x):
        h = v + (x - v) / 2.0
        s = Spike.apply(h - 0.5)
        return s, h * (1.0 - s)

    def forward(self, x):
        v, out = 0.0, []
        for t in range(x.shape[0]):
            s, v = self.neuron(v, self.current(x[t]))
            out.append(F.max_pool2d(s, 2, **self.options))
        return torch.stack(out), v


class Shortcut(Layer):
    """Two batch norms feed one neuron."""

    def current(self, x):
        return self.norm(self.conv(x)) + self.second(self.other(x))


class Residual(Layer):
    """What the neuron gives is added to what the batch norm gives."""

    def forward(self, x):
        v, out = 0.0, []
        for t in range(x.shape[0]):
            y = self.current(x[t])
            s, v = self.neuron(v, y)
            out.append(F.avg_pool2d(s + y, 2))
        return torch.stack(out), v


class ReadTwice(Layer):
    """Another layer reads the batch norm."""

    def forward(self, x):
        v, out = 0.0, []
        for t in range(x.shape[0]):
            y = self.current(x[t])
            s, v = self.neuron(v, y)
            out.append(F.avg_pool2d(s, 2) + F.avg_pool2d(y, 2))
        return torch.stack(out), v


class Learnable(Layer):
    """A gradient that is a sum over all channels."""

    def neuron(self, v, x):
        h = torch.sigmoid(self.tau) * v + x
        s = Spike.apply(h - 0.5)
        return s, h - s


class Bare(Layer):
    """No batch norm; the pooled spikes are viewed as rows, which only contiguous ones can be."""

    def forward(self, x):
        v, out = 0.0, []
        for t in range(x.shape[0]):
            s, v = self.neuron(v, self.conv(x[t]))
            out.append(F.max_pool2d(s, 2).view(s.shape[0], -1))
        return torch.stack(out), v


def compare(eager, x):
    """Outputs, states and buffers equal, gradients to rounding, the layout as eager's; what was counted."""
    ours = copy.deepcopy(eager)
    compiled = torch.compile(ours, backend="snn", fullgraph=True, options={"strict": True})
    for _ in range(2):
        results, gradients = [], []
        for model, run in ((eager, eager), (ours, compiled)):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            y, v = run(leaf)
            ((y * torch.linspace(0.5, 1.5, y.numel()).view(y.shape)).sum() + v.square().sum()).backward()
            results.append((y, v, *model.buffers()))
            gradients.append([leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
        assert a.stride() == b.stride()
    scale = max(g.abs().max() for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * scale.item())
    return counters["snn_compile"]


FUSED = {
    "one channel": (Layer, 1),
    "channels": (Layer, 2),
    "two norms": (Shortcut, 2),
    "the norm is read twice by the kernel": (Residual, 2),
    "overlapping windows": (lambda c: Layer(c, stride=1, padding=1), 2),
    "windows beyond the edge": (lambda c: Layer(c, ceil_mode=True), 2),
}


@pytest.mark.parametrize("case", FUSED)
def test_one_kernel(small, case):
    make, channels = FUSED[case]
    counted = compare(make(channels), torch.randn(5, 3, channels, 7, 9))
    assert counted["recurrences_stepped"] == 1 and counted["recurrences_lowered"] == 0
    assert counted["convolutions_channels_last"] == (2 if make is Shortcut else 1)


def test_dense_layers(small):
    class Dense(Layer):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Linear(6, 20), nn.BatchNorm1d(20)

        def forward(self, x):
            v, out = 0.0, []
            for t in range(x.shape[0]):
                s, v = self.neuron(v, self.current(x[t]))
                out.append(s)
            return torch.stack(out), v

    counted = compare(Dense(), torch.randn(5, 7, 6))
    assert counted["recurrences_stepped"] == 1 and counted["convolutions_channels_last"] == 0


class Shared(Layer):
    """One batch norm, twice a step."""

    def current(self, x):
        return self.norm(self.conv(x)) + self.norm(self.other(x))


def test_statistics_that_no_state_can_hold(small):
    x = torch.randn(5, 3, 2, 8, 8)
    eager = Shared()
    ours = copy.deepcopy(eager)
    for a, b in zip(eager(x), torch.compile(ours, backend="snn")(x), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    assert counters["snn_compile"]["recurrences_stepped"] == 0 and counters["snn_compile"]["recurrences_lowered"] == 1
    for a, b in zip(eager.buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("through_a_view", (False, True))
def test_a_value_that_is_written_into_keeps_its_layout(fresh, through_a_view):
    class Written(Bare):
        def forward(self, x):
            y = self.conv(x.flatten(0, 1))
            current = y.unflatten(0, x.shape[:2])
            out, v = [], torch.zeros(())
            for t in range(x.shape[0]):
                s, v = self.neuron(v, current[t])
                out.append(s)
            (y.view(-1) if through_a_view else y).mul_(2.0)
            return torch.stack(out) + current, v

    model, x = Written(), torch.randn(5, 3, 2, 8, 8)
    with torch.no_grad():
        expected, found = model(x), torch.compile(copy.deepcopy(model), backend="snn")(x)
    assert counters["snn_compile"]["recurrences_lowered"] == 1 and counters["snn_compile"]["convolutions_channels_last"] == 0
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.inductor  # (op by op, the last bits of a batch norm over time are others, and a spike is)
@pytest.mark.parametrize("make", (ReadTwice, Learnable))
def test_near_misses_stay_apart(small, make):
    counted = compare(make(), torch.randn(5, 3, 2, 8, 8))
    assert counted["recurrences_stepped"] == 0 and counted["recurrences_lowered"] == 1


@pytest.mark.inductor
def test_small_steps_stay_apart(fresh):
    counted = compare(Layer(), torch.randn(5, 3, 2, 8, 8))
    assert counted["recurrences_stepped"] == 0 and counted["recurrences_lowered"] == 1


def test_inference(small):
    model = Layer().eval()
    x = torch.randn(5, 3, 2, 8, 8)
    with torch.no_grad():
        expected, found = model(x), torch.compile(copy.deepcopy(model), backend="snn")(x)
    assert counters["snn_compile"]["recurrences_lowered"] == 1
    # (one number a channel would cut its rows into pieces)
    assert counters["snn_compile"]["convolutions_channels_last"] == 0
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a)
        assert a.stride() == b.stride()


def test_what_leaves_has_eagers_layout(fresh):
    counted = compare(Bare(), torch.randn(5, 3, 2, 8, 8))
    assert counted["recurrences_lowered"] == 1 and counted["convolutions_channels_last"] == 1


def test_channels_last_models_are_left_as_they_are(small):
    model = Layer().to(memory_format=torch.channels_last)
    x = torch.randn(5 * 3, 2, 8, 8).contiguous(memory_format=torch.channels_last).view(5, 3, 2, 8, 8)
    counted = compare(model, x)
    assert counted["recurrences_stepped"] == 1 and counted["convolutions_channels_last"] == 0


def test_convolutions_without_a_kernel_behind_them_are_left_alone(fresh):
    class Apart(Bare):
        def forward(self, x):
            y = self.conv(x[0]).sum()
            s, v = [], torch.zeros(3, 4)
            for t in range(x.shape[0]):
                spike, v = self.neuron(v, x[t, :, 0, 0, :4])
                s.append(spike)
            return torch.stack(s) + y, v

    counted = compare(Apart(), torch.randn(5, 3, 2, 8, 8))
    assert counted["recurrences_lowered"] == 1 and counted["convolutions_channels_last"] == 0


def test_explain_shows_it(small):
    report = str(snn_compile.explain(Layer())(torch.randn(5, 3, 2, 8, 8)))
    assert "aten.native_batch_norm" in report and "channel by channel" in report
