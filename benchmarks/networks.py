"""Whole networks, training step by step: eager, Inductor and snn on the same data in one run.

    python benchmarks/networks.py [name ...]

Each row: the first call (trace and compilation, forward and backward) and the median time of a training step (forward, loss,
backward) of interleaved runs, after a check that the outputs agree.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

import _harness as h
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snn_compile.backend import snn
from snn_compile.compat import prepare

ROUNDS = 7


def lif(v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """``h = v + (x - v)/2; s = H(h - 1); v = h*(1 - s)``"""
    h_ = v + (x - v) / 2.0
    s = h.Sigmoid.apply(h_ - 1.0)
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
        v1 = v2 = v3 = v4 = torch.zeros((), dtype=x.dtype)
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


class ConvNorm(nn.Sequential):
    """Convolution and batch norm over all steps at once, then the neuron: ``[T, B, C, H, W] -> [T, B, C', H', W']``."""

    def __init__(self, channels: int, out: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return multi_step_lif(super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


class SEWBlock(nn.Module):
    """Two convolutions, and the spikes of the block before added to theirs (Fang et al. 2021)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvNorm(channels, out, 3, stride), ConvNorm(out, out))
        self.shortcut = ConvNorm(channels, out, 1, stride) if stride > 1 or channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)  # type: ignore[no-any-return]


class SEWResNet18(nn.Module):
    """SEW-ResNet-18 for images of 32x32, channels-last, over ``[T, B, 3, 32, 32]``."""

    def __init__(self) -> None:
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
        self.stem, self.blocks = ConvNorm(3, 64), nn.Sequential(*(SEWBlock(*s) for s in sizes))
        self.head = nn.Linear(512, 10)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((3, 4))).mean(0)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Network:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # [T, B, ...]
    library: str = ""
    training: bool = True
    channels_last: bool = False
    prepared: bool = False  # `compat.prepare` for snn (the others run the model as it is)


NETWORKS = {
    "snnTorch tutorial, T=25": Network(SnnTorchTutorial, (25, 64, 64), "snntorch"),
    "snnTorch tutorial, T=100": Network(SnnTorchTutorial, (100, 64, 64), "snntorch"),
    "SpikingJelly tutorial, T=25": Network(SpikingJellyTutorial, (25, 64, 64), "spikingjelly"),
    "Norse tutorial, T=32": Network(NorseTutorial, (32, 64, 64), "norse", prepared=True),
    "sinabs tutorial, T=32": Network(SinabsTutorial, (32, 64, 64), "sinabs", prepared=True),
    "plain loop, static input, T=25": Network(lambda: Perceptron(static=True), (25, 64, 64)),
    "conv net, 8x8, T=16": Network(lambda: Convolutional(8), (16, 32, 1, 8, 8)),
    "conv net, 32x32, T=16": Network(lambda: Convolutional(32), (16, 16, 1, 32, 32)),
    "conv net, 32x32, T=16, inference": Network(lambda: Convolutional(32), (16, 16, 1, 32, 32), training=False),
    "SEW-ResNet-18, 32x32, T=4": Network(SEWResNet18, (4, 8, 3, 32, 32), channels_last=True),
    "SEW-ResNet-18, 32x32, T=4, inference": Network(SEWResNet18, (4, 8, 3, 32, 32), training=False, channels_last=True),
}


def _with_own_code(module: nn.Module) -> nn.Module:
    """Dynamo keeps what it decided by code object - that a loop with a graph break in it is left to Python, for one."""
    forward = type(module).forward
    own = FunctionType(forward.__code__.replace(), forward.__globals__, "forward", forward.__defaults__, forward.__closure__)
    module.__class__ = type(type(module).__name__, (type(module),), {"forward": own})
    return module


def step(network: Network, backend: object, x: Tensor, y: Tensor) -> tuple[Callable[[], Tensor], nn.Module]:
    torch.manual_seed(0)
    module = _with_own_code(network.make()).train(network.training)
    if network.prepared and backend is snn:
        prepare(module)
    run = module if backend is None else torch.compile(module, backend=backend)  # type: ignore[call-overload]

    def train() -> Tensor:
        for part in module.modules():  # (sinabs' layers keep their states)
            if callable(reset := getattr(part, "reset_states", None)):
                reset()
        out = run(x)
        module.zero_grad()
        F.cross_entropy(out, y).backward()
        return out.detach()

    def infer() -> Tensor:
        with torch.no_grad():
            return run(x)

    return (train if network.training else infer), module


def measure(name: str, network: Network) -> list[dict[str, str]]:
    torch.manual_seed(1)
    x = torch.rand(network.shape) * 2
    if network.channels_last:
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, network.shape[:2])
    y = torch.randint(0, 10, (network.shape[1],))
    runs, firsts, outs = {}, {}, {}
    for label, backend in (("eager", None), ("inductor", "inductor"), ("snn", snn)):
        torch._dynamo.reset()
        run, _ = step(network, backend, x, y)
        outs[label], firsts[label] = h.first_call(run)
        runs[label] = run
    for label, out in outs.items():
        torch.testing.assert_close(out, outs["eager"], rtol=1e-3, atol=2.0 / network.shape[0], msg=lambda m, n=label: f"{n}: {m}")
    agree = {k: float((o == outs["eager"]).float().mean()) for k, o in outs.items()}
    times = {k: statistics.median(v) for k, v in h.interleaved(runs, ROUNDS).items()}
    return [
        {
            "network": name,
            "framework": label,
            "first_call_s": f"{firsts[label]:.1f}",
            "step_ms": f"{times[label] * 1e3:.2f}",
            "speed_vs_eager": f"{times['eager'] / times[label]:.1f}",
            "equal_outputs": f"{agree[label]:.3f}",
            **h.machine(),
        }
        for label in runs
    ]


def main() -> None:
    rows = []
    for name, network in NETWORKS.items():
        if (sys.argv[1:] and not any(a in name for a in sys.argv[1:])) or (
            network.library and importlib.util.find_spec(network.library) is None
        ):
            continue
        rows += measure(name, network)
        columns = ["network", "framework", "first_call_s", "step_ms", "speed_vs_eager", "equal_outputs"]
        print(h.markdown(rows[-3:], columns), flush=True)
    if not sys.argv[1:]:
        h.write("networks_cpu", rows)


if __name__ == "__main__":
    main()
