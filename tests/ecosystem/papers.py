"""The ways in which papers' reference implementations write spiking networks, written by us in their style."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.zoo import ATan, FilledIn, Sigmoid


class Rectangle(torch.autograd.Function):
    """STBP's: a static method pair with module-level constants."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.gt(0.5).float()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad.clone() * (abs(x - 0.5) < 0.5).float()


spike = Rectangle.apply


def mem_update(layer: Callable[[Tensor], Tensor], x: Tensor, mem: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    mem = mem * 0.2 * (1.0 - s) + layer(x)
    return mem, spike(mem)


class STBP(nn.Module):
    """Wu et al. 2018: a Poisson encoder inside of the loop, `h_sumspike +=`, states as lists of zeros."""

    steps = 8

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(20, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        m1 = s1 = torch.zeros(x.shape[0], 16)
        m2 = s2 = sumspike = torch.zeros(x.shape[0], 10)
        for _ in range(self.steps):
            encoded = (x > torch.rand(x.size())).float()
            m1, s1 = mem_update(self.fc1, encoded, m1, s1)
            m2, s2 = mem_update(self.fc2, s1, m2, s2)
            sumspike = sumspike + s2
        return sumspike / self.steps


class TimedLayer(nn.Module):
    """A layer step by step into a tensor with time last, then a batch norm over all of it."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        steps = x.shape[-1]
        out = torch.zeros((*self.layer(x[..., 0]).shape, steps))
        for t in range(steps):
            out[..., t] = self.layer(x[..., t])
        return out if self.norm is None else self.norm(out)


class TimedSpikes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        u, out = torch.zeros(x.shape[:-1]), torch.zeros(x.shape)
        for t in range(x.shape[-1]):
            u = 0.2 * u * (1 - out[..., max(t - 1, 0)]) + x[..., t]
            out[..., t] = spike(u)
        return out


def threshold_dependent() -> nn.Module:
    """Zheng et al. 2021 (STBP-tdBN): layer after layer, each with a loop over time of its own."""
    first = TimedLayer(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm3d(4)), TimedSpikes(), TimedLayer(nn.AvgPool2d(2))
    second = TimedLayer(nn.Flatten(1)), TimedLayer(nn.Linear(64, 10)), TimedSpikes()
    return nn.Sequential(*first, *second)


class TET(nn.Module):
    """Deng et al. 2022: `mem = 0`, time at dim 1, outputs of all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        mem: Tensor | int = 0
        spikes = []
        for t in range(x.shape[1]):
            mem = mem * 0.5 + x[:, t, ...]
            s = Sigmoid.apply(mem - 0.3, 4.0)
            mem = (1 - s) * mem
            spikes.append(s)
        return torch.stack(spikes, dim=1)


class MSResNetBlock(nn.Module):
    """Hu et al. 2021: `if i >= 1`, a written buffer, batch norm over time and batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def mem_update(self, x: Tensor) -> Tensor:
        mem = torch.zeros_like(x[0])
        s = torch.zeros_like(x[0])
        output = torch.zeros_like(x)
        mem_old: Tensor | int = 0
        for i in range(x.shape[0]):
            mem = mem_old * 0.25 * (1 - s.detach()) + x[i] if i >= 1 else x[i]
            s = spike(mem)
            mem_old = mem.clone()
            output[i] = s
        return output

    def forward(self, x: Tensor) -> Tensor:
        y = self.mem_update(x)
        return self.norm(self.conv(y.flatten(0, 1))).unflatten(0, (x.shape[0], -1)) + x


class RadLIF(nn.Module):
    """sparch, Bittar and Garner 2022: clamped parameters, random initial states, a recurrent matrix without its diagonal."""

    def __init__(self, adaptive: bool = True, recurrent: bool = True) -> None:
        super().__init__()
        self.adaptive, self.recurrent = adaptive, recurrent
        self.w, self.norm = nn.Linear(20, 12, bias=False), nn.BatchNorm1d(12)
        self.alpha, self.beta = nn.Parameter(torch.rand(12) + 0.3), nn.Parameter(torch.rand(12) + 0.3)
        self.a, self.b = nn.Parameter(torch.rand(12)), nn.Parameter(torch.rand(12))
        self.v = nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        wx = self.w(x)
        wx = self.norm(wx.reshape(-1, wx.shape[2])).reshape(wx.shape)
        u, s = (torch.rand(wx.shape[0], 12) for _ in range(2))
        w = torch.rand(wx.shape[0], 12) if self.adaptive else None
        alpha, beta = torch.clamp(self.alpha, 0.81, 0.96), torch.clamp(self.beta, 0.96, 0.99)
        a, b = torch.clamp(self.a, -1.0, 1.0), torch.clamp(self.b, 0.0, 2.0)
        v = self.v.weight.clone().fill_diagonal_(0)
        out = []
        for t in range(wx.shape[1]):
            current = wx[:, t, :]
            if self.recurrent:
                current = current + torch.matmul(s, v)
            if self.adaptive:
                w = beta * w + a * u + b * s
                current = current - w
            u = alpha * (u - s) + (1 - alpha) * current
            s = ATan.apply(u - 0.2, 2.0)
            out.append(s)
        return torch.stack(out, dim=1)


class SpyTorch(nn.Module):
    """Zenke's tutorial: spikes from the membrane of the step before, a leaky readout, einsum, lists of records."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(20, 16) * 0.5), nn.Parameter(torch.randn(16, 10) * 0.5)
        self.alpha, self.beta = 0.8, 0.9

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h1 = torch.einsum("abc,cd->abd", (x, self.w1))
        syn, mem = torch.zeros(x.shape[0], 16), torch.zeros(x.shape[0], 16)
        spk_rec = []
        for t in range(x.shape[1]):
            out = FilledIn.apply(mem - 1.0)
            rst = out.detach()
            new_syn = self.alpha * syn + h1[:, t]
            mem = (self.beta * mem + syn) * (1.0 - rst)
            syn = new_syn
            spk_rec.append(out)
        spk = torch.stack(spk_rec, dim=1)
        h2 = torch.einsum("abc,cd->abd", (spk, self.w2))
        flt, out = torch.zeros(x.shape[0], 10), torch.zeros(x.shape[0], 10)
        out_rec = [out]
        for t in range(x.shape[1]):
            new_flt = self.alpha * flt + h2[:, t]
            out = self.beta * out + flt
            flt = new_flt
            out_rec.append(out)
        return torch.stack(out_rec, dim=1), spk


def multi_step_lif(x: Tensor, threshold: float = 0.5) -> Tensor:
    v, out = 0.0, []
    for t in range(x.shape[0]):
        v = v + (x[t] - v) / 2.0
        s = ATan.apply(v - threshold, 2.0)
        v = v * (1.0 - s)
        out.append(s)
    return torch.stack(out)


class SEWBlock(nn.Module):
    """Fang et al. 2021: two convolutions over [T*N, …], spikes added to the spikes of the block before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = multi_step_lif(self.norm1(self.conv1(x.flatten(0, 1))).unflatten(0, x.shape[:2]))
        y = multi_step_lif(self.norm2(self.conv2(y.flatten(0, 1))).unflatten(0, x.shape[:2]))
        return y + x


class SpikingSelfAttention(nn.Module):
    """Spikformer, Zhou et al. 2022: spiking queries, keys and values, no softmax."""

    def __init__(self, dim: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        steps, batch, tokens, dim = x.shape
        flat = x.flatten(0, 1)
        parts = []
        for linear, norm in zip(self.qkv, self.norms, strict=True):
            y = norm(linear(flat).transpose(-1, -2)).transpose(-1, -2).reshape(steps, batch, tokens, dim)
            s = multi_step_lif(y, 0.1)
            parts.append(s.reshape(steps, batch, tokens, self.heads, dim // self.heads).permute(0, 1, 3, 2, 4))
        q, k, v = parts
        y = (q @ k.transpose(-2, -1)) * 0.125 @ v
        y = y.transpose(2, 3).reshape(steps, batch, tokens, dim)
        return multi_step_lif(self.proj(multi_step_lif(y, 0.05)), 0.05)


class BNTT(nn.Module):
    """Kim & Panda 2021: batch norms and their statistics for each step, convolutional; a mask written into a tensor of zeros."""

    steps = 6

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)])
        self.bntt = nn.ModuleList([nn.ModuleList([nn.BatchNorm2d(4) for _ in range(self.steps)]) for _ in self.convs])
        self.pool, self.fc1, self.fc2 = nn.AvgPool2d(2), nn.Linear(64, 16, bias=False), nn.Linear(16, 3, bias=False)
        self.bntt_fc = nn.ModuleList([nn.BatchNorm1d(16) for _ in range(self.steps)])
        for norm in [n for norms in (*self.bntt, self.bntt_fc) for n in norms]:
            norm.bias = None

    def fire(self, mem: Tensor) -> tuple[Tensor, Tensor]:
        mem_thr = mem / 1.0 - 1.0
        rst = torch.zeros_like(mem)
        rst[mem_thr > 0] = 1.0
        return spike(mem_thr), mem - rst

    def forward(self, x: Tensor) -> Tensor:
        mem_conv = [torch.zeros(x.shape[0], 4, 8, 8) for _ in self.convs]
        mem_fc, mem_out = torch.zeros(x.shape[0], 16), torch.zeros(x.shape[0], 3)
        for t in range(self.steps):
            out = x
            for i, conv in enumerate(self.convs):
                mem_conv[i] = 0.95 * mem_conv[i] + self.bntt[i][t](conv(out))
                out, mem_conv[i] = self.fire(mem_conv[i])
            out = self.pool(out.clone()).reshape(x.shape[0], -1)
            mem_fc = 0.95 * mem_fc + self.bntt_fc[t](self.fc1(out))
            out, mem_fc = self.fire(mem_fc)
            mem_out = mem_out + self.fc2(out)
        return mem_out / self.steps


@dataclass(frozen=True)
class Paper:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    #: recurrences that must be compiled
    recurrences: int
    #: the layers around the neurons run in another shape or library, so that spikes may differ in the last place of a current
    exact: bool = True
    #: ops that must run once over all steps
    batched: int = 0


PAPERS = {
    "STBP": Paper(STBP, (5, 20), 2),
    "STBP-tdBN": Paper(threshold_dependent, (5, 2, 8, 8, 6), 2, exact=False, batched=4),
    "TET": Paper(TET, (5, 6, 20), 1),
    "MS-ResNet": Paper(MSResNetBlock, (6, 2, 4, 8, 8), 1, exact=False),
    "sparch LIF": Paper(lambda: RadLIF(adaptive=False, recurrent=False), (5, 9, 20), 1, exact=False),
    "sparch adLIF": Paper(lambda: RadLIF(recurrent=False), (5, 9, 20), 1, exact=False),
    "sparch RLIF": Paper(lambda: RadLIF(adaptive=False), (5, 9, 20), 1, exact=False),
    "sparch RadLIF": Paper(RadLIF, (5, 9, 20), 1, exact=False),
    "SpyTorch": Paper(SpyTorch, (5, 9, 20), 2),
    "SEW block": Paper(SEWBlock, (6, 2, 4, 8, 8), 2, exact=False),
    "BNTT": Paper(BNTT, (5, 2, 8, 8), 3, exact=False, batched=3),
    "spiking self-attention": Paper(SpikingSelfAttention, (4, 2, 5, 12), 5, exact=False),
}
