"""Single neurons over T and N, training and inference, fp32 and bf16, beside eager, Inductor and SpikingJelly in one run.

    python benchmarks/neurons.py [--check] [name ...]

Each row: spikes must equal eager's (Inductor's and SpikingJelly's agreement is written down), then all take turns. `of copy`:
bytes that the equations need to move, over the time, as a fraction of the bandwidth of a copy of the input measured in the same
run. Inductor is left out from T = 256 on, where it compiles for minutes. `--check` reruns a few cheap rows and fails where a
ratio is more than 25 % under the committed one.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import _harness as h
import torch
from torch import Tensor, nn

from snn_compile import neuron
from snn_compile.backend import snn
from snn_compile.compat import prepare

ROUNDS = 7


@dataclass(frozen=True)
class Row:
    neuron: str
    steps: int
    lanes: int
    training: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        dtype = "" if self.dtype == torch.float32 else ", bf16"
        return f"{self.neuron} T={self.steps} N={self.lanes}{'' if self.training else ' inference'}{dtype}"


class Steps(nn.Module):
    """A neuron of another library, which takes one step and its state, in a loop."""

    def __init__(self, cell: nn.Module, start: Callable[[], Tensor | None] = lambda: None) -> None:
        super().__init__()
        self.cell, self.start = cell, start

    def forward(self, x: Tensor) -> Tensor:
        state, spikes = self.start(), []
        for current in x.unbind(0):
            spike, state = self.cell(current, state)
            spikes.append(spike)
        return torch.stack(spikes)

    def reset(self) -> None:
        """Every call begins anew."""


def leaky() -> nn.Module:
    import snntorch

    cell = snntorch.Leaky(beta=0.9)
    return Steps(cell, cell.init_leaky)


def lif_cell() -> nn.Module:
    import norse.torch

    return prepare(Steps(norse.torch.LIFBoxCell()))


#: Neurons of other libraries; `snn` runs them as they are (Norse's prepared), beside Inductor.
OTHERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "snnTorch Leaky": ("snntorch", leaky),
    "Norse LIFBoxCell": ("norse", lif_cell),
}


def make(name: str, library=neuron) -> nn.Module:  # type: ignore[no-untyped-def]
    if name in OTHERS:
        return OTHERS[name][1]()
    arguments = {"EIFNode": {"delta_T": 1.0, "theta_rh": 0.8}}.get(name, {})
    node: nn.Module = getattr(library, name)(**arguments)
    node.step_mode = "m"
    return node


#: CPU: caches end between N = 65536 and N = 524288 lanes (`lif_training` has the largest).
ROWS = (
    *(Row("LIFNode", t, 65536) for t in (4, 16, 64, 256)),
    *(Row("LIFNode", 64, n) for n in (4096, 16384)),
    Row("LIFNode", 64, 65536, training=False),
    Row("LIFNode", 64, 65536, dtype=torch.bfloat16),
    *(Row(name, 64, 65536) for name in ("ParametricLIFNode", "CUBALIFNode", "ALIFNode", "EIFNode")),
    *(Row(name, 64, 65536) for name in OTHERS),
)
#: cheap, one of each kind
CHECKED = (
    "LIFNode T=16 N=65536",
    "LIFNode T=64 N=4096",
    "LIFNode T=64 N=65536",
    "LIFNode T=64 N=65536 inference",
    "ParametricLIFNode T=64 N=65536",
)


def peers(row: Row) -> dict[str, tuple[nn.Module, object]]:
    """Module and backend of each competitor."""
    found: dict[str, tuple[nn.Module, object]] = {"eager": (make(row.neuron), None), "snn": (make(row.neuron), snn)}
    if row.steps < 256:
        found["inductor"] = (make(row.neuron), "inductor")
    try:
        from spikingjelly.activation_based import neuron as theirs
    except ImportError:
        return found
    if hasattr(theirs, row.neuron):
        found["spikingjelly"] = (make(row.neuron, theirs), None)
    return found


def step_of(row: Row, module: nn.Module, backend: object, x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    module = copy.deepcopy(module).to(row.dtype)
    run = module if backend is None else torch.compile(module, backend=backend)  # type: ignore[call-overload]

    def step() -> Tensor:
        module.reset()
        if not row.training:
            with torch.no_grad():
                return run(x)
        x.grad = None
        y = run(x)
        y.backward(grad)
        return y.detach()

    return step


def measure(row: Row) -> list[dict[str, str]]:
    torch.manual_seed(0)
    x = (torch.randn(row.steps, row.lanes, dtype=row.dtype) * 2.0).requires_grad_(row.training)
    grad, target = torch.randn_like(x), torch.empty_like(x, requires_grad=False)
    steps, first = {}, {}
    for name, (module, backend) in peers(row).items():
        torch._dynamo.reset()
        steps[name] = step_of(row, module, backend, x, grad)
        _, first[name] = h.first_call(steps[name])
    expected, equal = steps["eager"](), {}
    for name, step in steps.items():
        equal[name] = (step() == expected).float().mean().item()
    assert equal["snn"] == 1.0, f"{row.name}: spikes differ from eager's"
    steps["copy"] = lambda: target.copy_(x.detach())
    times = h.interleaved(steps, ROUNDS)
    median = {name: statistics.median(values) for name, values in times.items()}
    # of [T, N]: read x, write s; backward: read x and the cotangent, write the gradient. A copy is two.
    tensors = 5 if row.training else 2
    rows = []
    for name in (n for n in times if n != "copy"):
        share = tensors / 2 * median["copy"] / median[name]
        rows.append(
            {
                "row": row.name,
                "framework": name,
                "first_call_s": f"{first[name]:.1f}",
                **h.summary(times[name]),
                "speed_vs_eager": f"{median['eager'] / median[name]:.2f}",
                "equal_spikes": f"{equal[name]:.4f}",
                "of_copy": f"{share:.2f}",
                **h.machine(),
            }
        )
    return rows


def check() -> None:
    """Rerun `CHECKED`; exit with 1 where the speed against eager or Inductor fell by more than a quarter."""
    with (h.RESULTS / "neurons_cpu.csv").open() as file:
        committed = {(r["row"], r["framework"]): float(r["median_ms"]) for r in csv.DictReader(file)}
    failed = False
    for row in (r for r in ROWS if r.name in CHECKED):
        now = {r["framework"]: float(r["median_ms"]) for r in measure(row)}
        for peer in (p for p in ("eager", "inductor") if p in now):
            before, after = committed[row.name, peer] / committed[row.name, "snn"], now[peer] / now["snn"]
            is_slower = after < 0.75 * before
            failed |= is_slower
            print(f"{row.name}: {after:.2f} times {peer}, committed {before:.2f}{'  SLOWER' if is_slower else ''}", flush=True)
    raise SystemExit(failed)


COLUMNS = ["row", "framework", "first_call_s", "median_ms", "speed_vs_eager", "equal_spikes", "of_copy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare a few rows with the committed results")
    parser.add_argument("names", nargs="*", help="only rows whose name contains one of these")
    args = parser.parse_args()
    if args.check:
        check()
    rows = []
    missing = {name for name, (library, _) in OTHERS.items() if importlib.util.find_spec(library) is None}
    wanted = [r for r in ROWS if not args.names or any(n in r.name for n in args.names)]
    for row in (r for r in wanted if r.neuron not in missing):
        rows += measure(row)
        print(h.markdown(rows[-5:] if len(rows) > 5 else rows, COLUMNS), flush=True)
    if not args.names:
        print(h.write("neurons_cpu", rows))


if __name__ == "__main__":
    main()
