"""Recurrences that are more than pointwise, training step by step: eager, Inductor and snn in one run.

    python benchmarks/stepped.py [name ...]

Recurrent LIF layers of the sizes used on spoken digits (SHD), inter-layer-connection neurons, membrane-potential batch norm.
Inductor is left out where the loop is so long that it would compile for an hour.
"""

from __future__ import annotations

import copy
import functools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import _harness as h
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from snn_compile import functional, neuron
from snn_compile.backend import snn

ROUNDS = 5


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
            s = h.Sigmoid.apply(h_ - 1.0)
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


@functools.cache
def gradient(shape: torch.Size) -> Tensor:
    """What comes from the layer behind: random, the same in every step."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def measure(name: str, case: Case) -> list[dict[str, str]]:
    torch.manual_seed(0)
    made, x = case.make(), torch.randn(case.shape) * case.scale
    x.requires_grad_()
    runs, firsts, results = {}, {}, {}
    for label, backend in (("eager", None), ("inductor", "inductor"), ("snn", snn)):
        if label == "inductor" and not case.inductor:
            continue
        torch._dynamo.reset()
        module = copy.deepcopy(made)
        run = module if backend is None else torch.compile(module, backend=backend)  # type: ignore[call-overload]

        def step(module: nn.Module = module, run: Callable[[Tensor], Tensor] = run) -> Tensor:
            functional.reset_net(module)
            module.zero_grad()
            x.grad = None
            out = run(x)
            out.backward(gradient(out.shape))
            return out.detach()

        out, firsts[label] = h.first_call(step)
        results[label] = [out, x.grad.clone(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]  # type: ignore[union-attr]
        runs[label] = step
    found = counters["snn_compile"]
    assert found["recurrences_stepped"] or found["convolutions_replaced"]  # (a short loop: unrolled, with products)
    times = {k: statistics.median(v) for k, v in h.interleaved(runs, ROUNDS).items()}
    rows = []
    for label in runs:
        pairs = list(zip(results[label], results["eager"], strict=True))
        errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs[1:]]
        rows.append(
            {
                "recurrence": name,
                "framework": label,
                "first_call_s": f"{firsts[label]:.1f}",
                "step_ms": f"{times[label] * 1e3:.1f}",
                "speed_vs_eager": f"{times['eager'] / times[label]:.1f}",
                "spikes_per_step": f"{float(results[label][0].mean()):.3f}",
                "equal_outputs": f"{float((pairs[0][0] == pairs[0][1]).float().mean()):.4f}",
                "gradient_error": f"{max(errors):.0e}",
                **h.machine(),
            }
        )
    return rows


def main() -> None:
    rows = []
    for name, case in CASES.items():
        if sys.argv[1:] and not any(a in name for a in sys.argv[1:]):
            continue
        found = measure(name, case)
        rows += found
        columns = ["recurrence", "framework", "first_call_s", "step_ms", "speed_vs_eager", "equal_outputs", "gradient_error"]
        print(h.markdown(found, columns), flush=True)
    if not sys.argv[1:]:
        h.write("stepped_cpu", rows)


if __name__ == "__main__":
    main()
