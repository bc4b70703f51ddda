"""The networks that are measured: tutorials of four libraries with their own neurons, and three with a plain LIF neuron."""

from __future__ import annotations

from collections.abc import Callable

import torch
from _loops import Sigmoid
from torch import Tensor, nn
from torch.nn import functional as F


def lif(v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """``h = v + (x - v)/2; s = H(h - 1); v = h*(1 - s)``"""
    h_ = v + (x - v) / 2.0
    s = Sigmoid.apply(h_ - 1.0)
    return s, h_ * (1.0 - s)


class Perceptron(nn.Module):
    """64-128-10 on a time-varying or a static input, the loop over single steps."""

    def __init__(self, static: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2, self.static = nn.Linear(64, 128), nn.Linear(128, 10), static

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[1]
        v1, v2 = x.new_zeros(batch, 128), x.new_zeros(batch, 10)
        out = []
        for t in range(x.shape[0]):
            s, v1 = lif(v1, self.fc1(x[0] if self.static else x[t]))
            s, v2 = lif(v2, self.fc2(s))
            out.append(s)
        return torch.stack(out).mean(0)


class Convolutional(nn.Module):
    """2 convolutions with batch norm and pooling, 2 dense layers, the loop over single steps."""

    def __init__(self, size: int, channels: int = 16, norm: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, channels, 3, padding=1), nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.norm2 = nn.BatchNorm2d(2 * channels) if norm else nn.Identity()
        self.fc1, self.fc2 = nn.Linear(2 * channels * (size // 4) ** 2, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        v1 = v2 = v3 = v4 = torch.zeros((), dtype=x.dtype, device=x.device)
        total = 0.0
        for t in range(x.shape[0]):
            s, v1 = lif(v1, self.norm1(self.conv1(x[t])))
            s, v2 = lif(v2, self.norm2(self.conv2(F.max_pool2d(s, 2))))
            s, v3 = lif(v3, self.fc1(F.max_pool2d(s, 2).flatten(1)))
            s, v4 = lif(v4, self.fc2(s))
            total = total + s
        return total / x.shape[0]


class SnnTorchTutorial(nn.Module):
    """Tutorial 5 of snnTorch, with its own neurons."""

    def __init__(self) -> None:
        super().__init__()
        import snntorch

        self.fc1, self.lif1 = nn.Linear(64, 128), snntorch.Leaky(beta=0.95)
        self.fc2, self.lif2 = nn.Linear(128, 10), snntorch.Leaky(beta=0.95)

    def forward(self, x: Tensor) -> Tensor:
        mem1, mem2, out = self.lif1.init_leaky(), self.lif2.init_leaky(), []
        for step in range(x.shape[0]):
            spk1, mem1 = self.lif1(self.fc1(x[step]), mem1)
            _, mem2 = self.lif2(self.fc2(spk1), mem2)
            out.append(mem2)
        return torch.stack(out).mean(0)


class SpikingJellyTutorial(nn.Module):
    """The first tutorial of SpikingJelly, single steps, with its own neurons."""

    def __init__(self) -> None:
        super().__init__()
        from spikingjelly.activation_based import neuron

        self.layer = nn.Sequential(nn.Linear(64, 128), neuron.LIFNode(), nn.Linear(128, 10), neuron.LIFNode())

    def forward(self, x: Tensor) -> Tensor:
        from spikingjelly.activation_based import functional

        functional.reset_net(self)
        rate = 0.0
        for t in range(x.shape[0]):
            rate = rate + self.layer(x[t])
        return rate / x.shape[0]


class NorseTutorial(nn.Module):
    """Norse's MNIST tutorial with its own cells; `compat.prepare` gives them their initial states."""

    def __init__(self) -> None:
        super().__init__()
        import norse.torch as norse

        self.fc1, self.lif = nn.Linear(64, 128), norse.LIFCell()
        self.fc2, self.readout = nn.Linear(128, 10, bias=False), norse.LICell()

    def forward(self, x: Tensor) -> Tensor:
        state = read = None
        voltages = []
        for t in range(x.shape[0]):
            z, state = self.lif(self.fc1(x[t] * 10), state)
            v, read = self.readout(torch.relu(self.fc2(z)), read)
            voltages.append(v)
        return torch.stack(voltages).max(0).values


class SinabsTutorial(nn.Module):
    """sinabs' first tutorial: dense layers and `IAFSqueeze` over ``[B*T, N]``, with its own spike function, prepared."""

    def __init__(self, batch: int = 64) -> None:
        super().__init__()
        import sinabs.layers as layers

        self.layers = nn.Sequential(
            nn.Linear(64, 128, bias=False),
            layers.IAFSqueeze(batch_size=batch, min_v_mem=-1.0),
            nn.Linear(128, 10, bias=False),
            layers.IAFSqueeze(batch_size=batch, min_v_mem=-1.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        steps, batch = x.shape[:2]
        return self.layers(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (batch, steps)).mean(1)  # type: ignore[no-any-return]


def multi_step_lif(x: Tensor) -> Tensor:
    """`lif` over ``x [T, B, ...]``."""
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        s, v = lif(v, x[t])
        out.append(s)
    return torch.stack(out)


class SpikingJellyLIF(nn.Module):
    """The same neuron in SpikingJelly, with its own kernel where it has one."""

    def __init__(self) -> None:
        super().__init__()
        from spikingjelly.activation_based import neuron

        self.node = neuron.LIFNode(step_mode="m")

    def forward(self, x: Tensor) -> Tensor:
        self.node.reset()
        return self.node(x)  # type: ignore[no-any-return]


MakeNeuron = Callable[[], Callable[[Tensor], Tensor]]


class ConvNorm(nn.Module):
    """Convolution and batch norm over all steps at once, then the neuron: ``[T, B, C, H, W] -> [T, B, C', H', W']``."""

    def __init__(self, neuron: MakeNeuron, channels: int, out: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
        self.norm, self.neuron = nn.BatchNorm2d(out), neuron()

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(self.norm(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2]))


class SEWBlock(nn.Module):
    """Two convolutions, and the spikes of the block before added to theirs (Fang et al. 2021)."""

    def __init__(self, neuron: MakeNeuron, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvNorm(neuron, channels, out, 3, stride), ConvNorm(neuron, out, out))
        is_equal = stride == 1 and channels == out
        self.shortcut = nn.Identity() if is_equal else ConvNorm(neuron, channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)  # type: ignore[no-any-return]


class SEWResNet18(nn.Module):
    """SEW-ResNet-18 for small images, channels-last, over ``[T, B, 3, H, W]``."""

    def __init__(self, neuron: MakeNeuron = lambda: multi_step_lif) -> None:
        super().__init__()
        sizes = (
            (64, 64, 1),
            (64, 64, 1),
            (64, 128, 2),
            (128, 128, 1),
            (128, 256, 2),
            (256, 256, 1),
            (256, 512, 2),
            (512, 512, 1),
        )
        self.stem = ConvNorm(neuron, 3, 64)
        self.blocks = nn.Sequential(*(SEWBlock(neuron, *s) for s in sizes))
        self.head = nn.Linear(512, 10)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((3, 4))).mean(0)  # type: ignore[no-any-return]
