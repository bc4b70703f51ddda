"""What a batch norm in the potential costs in evaluation, where it is folded: MPBN-LIF in turns with the neuron without it.

python benchmarks/folding.py [--device cuda] [--update] [name ...]
"""

from __future__ import annotations

import copy

import _harness as h
import torch
from _device import moved
from _gate import Limits
from torch import Tensor, nn

from snn_compile import functional, neuron
from snn_compile.backend import snn

#: T, N, C, H, W
SHAPES = {str(list(shape)): shape for shape in ((8, 32, 64, 16, 16), (16, 32, 128, 8, 8))}
BACKENDS = {"eager": None, "inductor": "inductor", "snn": snn}
WITHOUT, WITH = "LIF", "MPBN-LIF"
#: enough for a tenth to show beside the machine's noise
ROUNDS = 60


def neurons(channels: int) -> dict[str, nn.Module]:
    """The same charge, fire and reset; the batch norm has statistics as if trained, and scales of both signs and a zero."""
    normed = neuron.MPBNLIFNode(out_channels=channels, decay_input=True, step_mode="m")
    (norm,) = (m for m in normed.modules() if isinstance(m, nn.BatchNorm2d))
    nn.init.normal_(norm.running_mean, std=0.1)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    nn.init.normal_(norm.weight)
    nn.init.zeros_(norm.weight[:1])
    nn.init.normal_(norm.bias, std=0.1)
    return {WITHOUT: neuron.LIFNode(step_mode="m"), WITH: normed}


def step(made: nn.Module, backend: object, x: Tensor) -> h.Step:
    module = copy.deepcopy(made).eval()
    run = module if backend is None else torch.compile(module, backend=backend)  # type: ignore[call-overload]

    @torch.no_grad()
    def infer() -> list[Tensor]:
        functional.reset_net(module)
        return [run(x)]

    return infer


def measure(shape_name: str, shape: tuple[int, ...], device: torch.device) -> list[dict[str, str]]:
    torch.manual_seed(0)
    x = torch.randn(shape, device=device)
    made = neurons(shape[2])
    contests = {
        name: h.contest(
            {label: lambda m=m, b=b: step(m, b, x) for label, b in BACKENDS.items()},  # type: ignore[misc]
            device,
            Limits(),
            f"{name}, {shape_name}",
        )
        for name, m in ((name, moved(m, device)) for name, m in made.items())
    }
    # (what is compared follows one another)
    pairs = [(framework, name, c) for framework in BACKENDS for name, c in contests.items() if framework in c.steps]
    runs = {f"{name}, {framework}": c.steps[framework] for framework, name, c in pairs}
    times = h.interleaved(runs, device, rounds=ROUNDS)
    of, rows = h.medians(times), []
    for name, c in contests.items():
        mine = {framework: times[f"{name}, {framework}"] for framework in c.steps}

        def values(framework: str, name: str = name, mine: dict[str, list[float]] = mine) -> dict[str, str]:
            cost = of[f"{name}, {framework}"] / of[f"{WITHOUT}, {framework}"]
            return {**h.step_cells(contests[name], mine, framework, digits=2), "cost_vs_lif": f"{cost:.2f}"}

        rows += c.rows({"neuron": name, "shape": shape_name}, values)
    return rows


COLUMNS = ["neuron", "shape", "framework", "first_call_s", "step_ms", "speed_vs_eager", "cost_vs_lif"]


def main() -> None:
    h.run("folding", lambda device: SHAPES, measure, COLUMNS, h.arguments(__doc__).parse_args(), key=3)


if __name__ == "__main__":
    main()
