"""`snn_compile.fold`: batch norms in thresholds, as a plain module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import snn_compile
from snn_compile.errors import SnnCompileError

T, B, C = 5, 3, 6


class Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Net(nn.Module):
    """A layer, and a neuron that fires on its normalised potential."""

    def __init__(self, images: bool = False, soft: bool = False, by_hand: bool = False, carries: bool = False) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, C, 3, padding=1) if images else nn.Linear(4, C)
        self.norm = nn.BatchNorm2d(C) if images else nn.BatchNorm1d(C)
        self.soft, self.by_hand, self.carries = soft, by_hand, carries
        generator = torch.Generator().manual_seed(int(images) + 2 * soft)
        with torch.no_grad():
            self.norm.running_mean.normal_(generator=generator)
            self.norm.running_var.uniform_(0.2, 2.0, generator=generator)
            self.norm.weight.copy_(torch.tensor([1.5, -0.7, 0.0, 0.3, -2.0, 0.0]))
            self.norm.bias.copy_(torch.tensor([0.2, -0.1, 2.0, 1.0, 0.0, 0.3]))

    def normalise(self, h):
        if not self.by_hand:
            return self.norm(h)
        shape = (-1, *(1,) * (h.dim() - 2))
        n = self.norm
        mean, var, w, b = (p.view(shape) for p in (n.running_mean, n.running_var, n.weight, n.bias))
        return (h - mean) / torch.sqrt(var + n.eps) * w + b

    def forward(self, x):
        v, spikes = 0.0, []
        for t in range(x.shape[0]):
            h = 0.7 * v + self.layer(x[t])
            u = self.normalise(h)
            s = Heaviside.apply(u - 1.0)
            h = u if self.carries else h
            v = h - s if self.soft else h * (1.0 - s)
            spikes.append(s)
        return {"spikes": torch.stack(spikes), "potential": v}


def data(images: bool):
    return torch.randn(T, B, 2, 7, 8, generator=torch.Generator().manual_seed(3)) if images else torch.randn(T, B, 4)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("images", [False, True])
def test_folded_equals_unfolded(images, soft, by_hand):
    net, x = Net(images, soft, by_hand), data(images)
    before = copy.deepcopy(net.state_dict())
    folded = snn_compile.fold(net, x)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.eval()
    for inputs in (x, 2.0 * x.flip(0)):
        expected, got = net(inputs), folded(inputs)
        assert 0.05 < float(expected["spikes"].mean()) < 0.95
        for key in expected:
            torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-5)
    sign, threshold = (b.flatten() for b in (folded.sign, folded.threshold))
    assert sign.numel() == threshold.numel() == C
    n = net.norm
    slope = n.weight / torch.sqrt(n.running_var + n.eps)
    live = slope != 0
    torch.testing.assert_close(sign[live], slope.sign()[live])
    torch.testing.assert_close(
        threshold[live], (slope.sign() * ((1.0 - n.bias) / slope + n.running_mean))[live], rtol=1e-5, atol=1e-5
    )
    assert threshold[2] == -torch.inf and threshold[5] == torch.inf  # gamma is 0: fires in every step, or in none
    names = {name for name, _ in folded.named_buffers()}
    assert not [name for name in names if "norm" in name], names


def test_many_draws_of_parameters():
    net, x = Net(), torch.randn(T, 40, 4)
    generator = torch.Generator().manual_seed(0)
    different = 0.0
    for _ in range(30):
        with torch.no_grad():
            for p in (net.norm.weight, net.norm.bias, net.norm.running_mean):
                p.normal_(generator=generator)
            net.norm.weight[torch.rand(C, generator=generator) < 0.2] = 0.0
        folded = snn_compile.fold(net, x)
        different += float((folded(x)["spikes"] != net.eval()(x)["spikes"]).float().mean())
    assert different == 0.0  # (a potential within rounding of its threshold may differ; there is none)


def test_two_neurons_and_export():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Net(), Net()
            self.second.layer = nn.Linear(C, C)

        def forward(self, unread, x):
            return self.second(self.first(x)["spikes"])["spikes"], 3

    net, x = Two(), data(False)
    folded = snn_compile.fold(net, x[0], x)
    expected, number = net.eval()(x[0], x)
    got, same = folded(x[0], x)
    assert number == same == 3
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert {"threshold", "threshold_1", "sign", "sign_1"} <= {name for name, _ in folded.named_buffers()}
    exported = torch.export.export(folded, (x[0], x)).module()
    assert torch.equal(exported(x[0], x)[0], got)
    assert all(n.target.namespace == "aten" for n in folded.graph.nodes if isinstance(n.target, torch._ops.OpOverload))


def test_nothing_to_fold_says_why():
    class Plain(nn.Module):
        def forward(self, x):
            v, out = torch.zeros_like(x[0]), []
            for t in range(x.shape[0]):
                h = v + x[t]
                s = Heaviside.apply(h - 1.0)
                v = h * (1.0 - s)
                out.append(s)
            return torch.stack(out)

    with pytest.raises(SnnCompileError, match="no batch norm between charge and fire"):
        snn_compile.fold(Plain(), data(False))
    with pytest.raises(SnnCompileError, match="the normalised potential is carried on"):
        snn_compile.fold(Net(carries=True), data(False))
