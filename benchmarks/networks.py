"""Whole networks, training step by step: eager, Inductor and snn on the same data in one run.

    python benchmarks/networks.py [--device cuda] [--update] [name ...]

Each row: the first call (trace and compilation, forward and backward) and the median time of a training step (forward, loss,
backward) of interleaved runs, after a check that the outputs agree.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType

import _harness as h
import torch
from _device import moved
from _gate import Agreement, Limits
from network_models import (
    Convolutional,
    NorseTutorial,
    Perceptron,
    SEWResNet18,
    SinabsTutorial,
    SnnTorchTutorial,
    SpikingJellyLIF,
    SpikingJellyTutorial,
)
from torch import Tensor, nn
from torch.nn import functional as F

from snn_compile.backend import snn
from snn_compile.compat import prepare


@dataclass(frozen=True)
class Network:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # [T, B, ...]
    library: str = ""
    training: bool = True
    channels_last: bool = False
    prepared: bool = False  # `compat.prepare` for snn (the others run the model as it is)
    batch_on_gpu: int = 0  # instead of the shape's, where that is too little work
    autocast: torch.dtype | None = None
    peer: Callable[[], nn.Module] | None = None  # the same network with SpikingJelly's neurons

    def shape_on(self, device: torch.device) -> tuple[int, ...]:
        steps, batch, *rest = self.shape
        return (steps, self.batch_on_gpu if device.type == "cuda" and self.batch_on_gpu else batch, *rest)

    is_deep: bool = False

    @property
    def limits(self) -> Limits:
        """Layers over all steps at once sum in another order, which moves a spike now and then. Of a deep network's outputs that
        leaves nothing to compare but that they are numbers: `require_in_double` stands before it."""
        return Limits(equal=0.0, output=2.0 if self.is_deep else 0.05, gradient=float("inf"))


def sew(**options: object) -> Network:
    make_peer = lambda: SEWResNet18(SpikingJellyLIF)  # noqa: E731
    return Network(SEWResNet18, (4, 8, 3, 32, 32), channels_last=True, batch_on_gpu=64, peer=make_peer, is_deep=True, **options)  # type: ignore[arg-type]


NETWORKS = {
    "snnTorch tutorial, T=25": Network(SnnTorchTutorial, (25, 64, 64), "snntorch"),
    "snnTorch tutorial, T=100": Network(SnnTorchTutorial, (100, 64, 64), "snntorch"),
    "SpikingJelly tutorial, T=25": Network(SpikingJellyTutorial, (25, 64, 64), "spikingjelly"),
    "Norse tutorial, T=32": Network(NorseTutorial, (32, 64, 64), "norse", prepared=True),
    "sinabs tutorial, T=32": Network(SinabsTutorial, (32, 64, 64), "sinabs", prepared=True),
    "plain loop, static input, T=25": Network(lambda: Perceptron(static=True), (25, 64, 64)),
    "conv net, 8x8, T=16": Network(lambda: Convolutional(8), (16, 32, 1, 8, 8), batch_on_gpu=256),
    "conv net, 32x32, T=16": Network(lambda: Convolutional(32), (16, 16, 1, 32, 32), batch_on_gpu=128),
    "conv net, 32x32, T=16, inference": Network(lambda: Convolutional(32), (16, 16, 1, 32, 32), training=False, batch_on_gpu=128),
    "SEW-ResNet-18, 32x32, T=4": sew(),
    "SEW-ResNet-18, 32x32, T=4, inference": sew(training=False),
}
#: in the precision that a GPU is trained in
GPU_NETWORKS = {
    "SEW-ResNet-18, 32x32, T=4, bf16": sew(autocast=torch.bfloat16),
    "SEW-ResNet-18, 32x32, T=4, fp16, inference": sew(autocast=torch.float16, training=False),
}


def rows(device: torch.device) -> dict[str, Network]:
    """By name, those whose library is here."""
    found = {}
    for name, network in ({**NETWORKS, **GPU_NETWORKS} if device.type == "cuda" else NETWORKS).items():
        if network.library and importlib.util.find_spec(network.library) is None:
            print(f"{name}: {network.library} is not installed, no row")
        else:
            found[name] = network
    return found


def _with_own_code(module: nn.Module) -> nn.Module:
    """Dynamo keeps what it decided by code object - that a loop with a graph break in it is left to Python, for one."""
    forward = type(module).forward
    own = FunctionType(forward.__code__.replace(), forward.__globals__, "forward", forward.__defaults__, forward.__closure__)
    module.__class__ = type(type(module).__name__, (type(module),), {"forward": own})
    return module


def step(network: Network, make: Callable[[], nn.Module], backend: object, x: Tensor, y: Tensor) -> h.Step:
    """In the dtype of x."""
    torch.manual_seed(0)
    module = _with_own_code(make()).train(network.training)
    if network.prepared and backend is snn:
        prepare(module)
    moved(module, x.device, x.dtype)
    run = module if backend is None else torch.compile(module, backend=backend)  # type: ignore[call-overload]
    autocast = torch.autocast(x.device.type, dtype=network.autocast, enabled=network.autocast is not None)

    def train() -> list[Tensor]:
        for part in module.modules():  # (sinabs' layers keep their states)
            if callable(reset := getattr(part, "reset_states", None)):
                reset()
        module.zero_grad()
        with autocast:
            out = run(x)
            loss = F.cross_entropy(out, y)
        loss.backward()
        return [out, *(p.grad for p in module.parameters() if p.grad is not None)]

    def infer() -> list[Tensor]:
        with torch.no_grad(), autocast:
            return [run(x)]

    return train if network.training else infer


def inputs(network: Network, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = network.shape_on(device)
    torch.manual_seed(1)
    x = torch.rand(shape, device=device) * 2
    if network.channels_last:
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
    return x, torch.randint(0, 10, (shape[1],), device=device)


def require_in_double(name: str, network: Network, device: torch.device) -> None:
    """In fp64 no sum is so close to a threshold that its order moves a spike: outputs and gradients are eager's. (Two images of
    the CPU's batch are enough for that.)"""
    small = replace(network, shape=(network.shape[0], 2, *network.shape[2:]), batch_on_gpu=0, autocast=None)
    x, y = inputs(small, device)
    torch._dynamo.reset()
    eager, ours = (step(small, small.make, backend, x.double(), y)() for backend in (None, snn))
    Agreement.of(ours, eager).require(Limits(equal=0.0, output=1e-9, gradient=1e-6), f"{name}, snn, in fp64")


def measure(name: str, network: Network, device: torch.device) -> list[dict[str, str]]:
    x, y = inputs(network, device)
    makers = {
        label: lambda backend=backend: step(network, network.make, backend, x, y)  # type: ignore[misc]
        for label, backend in (("eager", None), ("inductor", "inductor"), ("snn", snn))
    }
    if network.peer is not None:
        makers["spikingjelly"] = lambda: step(network, network.peer, None, x, y)  # type: ignore[arg-type]
    if network.is_deep:
        require_in_double(name, network, device)
    contest = h.contest(makers, device, network.limits, name)
    times = h.interleaved(contest.steps, device)

    def values(framework: str) -> dict[str, str]:
        return {
            **h.step_cells(contest, times, framework, digits=2),
            "equal_outputs": f"{contest.agreement[framework].equal:.3f}",
            "output_error": f"{contest.agreement[framework].output:.0e}",
            "input": str(list(x.shape)),
        }

    return contest.rows({"network": name}, values)


COLUMNS = ["network", "framework", "first_call_s", "step_ms", "speed_vs_eager", "equal_outputs", "output_error"]


def main() -> None:
    h.run("networks", rows, measure, COLUMNS, h.arguments(__doc__).parse_args())


if __name__ == "__main__":
    main()
