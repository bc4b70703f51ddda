"""Recurrences that are more than pointwise, training step by step: eager, Inductor and snn in one run.

    python benchmarks/stepped.py [--device cuda] [--update] [name ...]

Recurrent LIF layers of the sizes used on spoken digits (SHD), inter-layer-connection neurons, membrane-potential batch norm.
Inductor is left out where the loop is so long that it would compile for an hour.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import _harness as h
import torch
from _device import moved
from _gate import Limits
from _loops import Sigmoid
from torch import Tensor, nn

from snn_compile import functional, neuron
from snn_compile.backend import snn


class RecurrentLIF(nn.Module):
    """Input layer, LIF neurons, and a dense layer from their spikes to themselves."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.feedforward, self.recurrent = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        current = self.feedforward(x)
        v, s, spikes = torch.zeros_like(current[0]), torch.zeros_like(current[0]), []
        for t in range(x.shape[0]):
            h_ = v + (current[t] + self.recurrent(s) - v) / 2.0
            s = Sigmoid.apply(h_ - 1.0)
            v = h_ * (1.0 - s)
            spikes.append(s)
        return torch.stack(spikes)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    inductor: bool = True
    scale: float = 1.0  # of the input: neurons of the recurrent layers fire in every tenth step


CASES = {
    "recurrent LIF, H=128, T=250, B=128": Case(lambda: RecurrentLIF(140, 128), (250, 128, 140), inductor=False, scale=2.5),
    "recurrent LIF, H=512, T=250, B=128": Case(lambda: RecurrentLIF(140, 512), (250, 128, 140), inductor=False, scale=2.5),
    "recurrent LIF, H=128, T=32, B=128": Case(lambda: RecurrentLIF(140, 128), (32, 128, 140), scale=2.5),
    "ILC-CUBA-LIF, 8x10, T=16, B=256": Case(lambda: neuron.ILCCUBALIFNode(8, 10), (16, 256, 80)),
    "MPBN-LIF, T=8, [32, 64, 16, 16]": Case(lambda: neuron.MPBNLIFNode(out_channels=64, step_mode="m"), (8, 32, 64, 16, 16)),
}


#: a product of matrices that sums in another order moves a spike now and then, and all that follows from it
LIMITS = Limits(equal=0.99, gradient=5e-2)


@functools.cache
def gradient(shape: torch.Size, device: torch.device) -> Tensor:
    """What comes from the layer behind: random, the same in every step."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)


def step(made: nn.Module, backend: object, x: Tensor) -> h.Step:
    module = copy.deepcopy(made)
    run = module if backend is None else torch.compile(module, backend=backend)  # type: ignore[call-overload]

    def train() -> list[Tensor]:
        functional.reset_net(module)
        module.zero_grad()
        x.grad = None
        out = run(x)
        out.backward(gradient(out.shape, out.device))
        return [out, x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]  # type: ignore[list-item]

    return train


def measure(name: str, case: Case, device: torch.device) -> list[dict[str, str]]:
    torch.manual_seed(0)
    made = moved(case.make(), device)
    x = (torch.randn(case.shape, device=device) * case.scale).requires_grad_()
    makers = {
        label: lambda backend=backend: step(made, backend, x)  # type: ignore[misc]
        for label, backend in (("eager", None), ("inductor", "inductor"), ("snn", snn))
        if case.inductor or label != "inductor"
    }
    contest = h.contest(makers, device, LIMITS, name)
    times = h.interleaved(contest.steps, device)

    def values(framework: str) -> dict[str, str]:
        return {
            **h.step_cells(contest, times, framework, digits=1),
            "spikes_per_step": f"{contest.agreement[framework].mean:.3f}",
            "equal_outputs": f"{contest.agreement[framework].equal:.4f}",
            "gradient_error": f"{contest.agreement[framework].gradient:.0e}",
        }

    return contest.rows({"recurrence": name}, values)


COLUMNS = ["recurrence", "framework", "first_call_s", "step_ms", "speed_vs_eager", "equal_outputs", "gradient_error"]


def main() -> None:
    h.run("stepped", lambda device: CASES, measure, COLUMNS, h.arguments(__doc__).parse_args())


if __name__ == "__main__":
    main()
