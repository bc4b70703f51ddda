"""Single neurons over T and N, training and inference, fp32, bf16 and fp16, beside eager, Inductor and SpikingJelly in one run.

    python benchmarks/neurons.py [--device cuda] [--update] [--check] [name ...]

Each row: spikes and gradients must be eager's (Inductor's and SpikingJelly's agreement is written down), then all take turns.
`of_copy`: the bytes that the kernels' plan moves, over the time, as a fraction of the bandwidth of a copy in the same run.
Inductor is left out where it compiles for minutes. `--check` reruns a few cheap rows and fails where a ratio is more than 25 %
under the committed one.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import _harness as h
import torch
from _device import moved
from _gate import Limits
from _results import read
from torch import Tensor, nn

from snn_compile import backend, neuron
from snn_compile.backend import snn
from snn_compile.compat import prepare
from snn_compile.explain import traffic

#: a copy's tensor on a GPU, at least: its caches hold no part of it that matters
COPIED = 1 << 30
CHANNELS, IMAGE = 64, (16, 16)


@dataclass(frozen=True)
class Row:
    neuron: str
    steps: int
    lanes: int
    training: bool = True
    dtype: torch.dtype = torch.float32
    inductor: bool = True

    @property
    def name(self) -> str:
        dtype = {torch.float32: "", torch.bfloat16: ", bf16", torch.float16: ", fp16"}[self.dtype]
        return f"{self.neuron} T={self.steps} N={self.lanes}{'' if self.training else ' inference'}{dtype}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input; neurons with batch norm need channels."""
        if not self.neuron.startswith("MPBN"):
            return (self.steps, self.lanes)
        batch = self.lanes // (CHANNELS * IMAGE[0] * IMAGE[1])
        return (self.steps, batch, CHANNELS, *IMAGE)

    def limits(self, device: torch.device) -> Limits:
        """Bit for bit, but for a GPU's `exp` and the sums of batch norm, which Inductor has where T is small; gradients are
        rounded to 16 bits once, and by eager in every op."""
        exact = Limits(gradient=1e-3 if self.dtype == torch.float32 else 5e-2)
        if self.neuron == "MPBNLIFNode":
            return Limits(equal=0.98, gradient=5e-2)
        return Limits(equal=0.999, gradient=5e-2) if self.neuron == "EIFNode" and device.type == "cuda" else exact


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
ARGUMENTS = {"EIFNode": {"delta_T": 1.0, "theta_rh": 0.8}, "MPBNLIFNode": {"out_channels": CHANNELS}}


def make(name: str, library=neuron) -> nn.Module:  # type: ignore[no-untyped-def]
    if name in OTHERS:
        return OTHERS[name][1]()
    node: nn.Module = getattr(library, name)(**ARGUMENTS.get(name, {}))
    node.step_mode = "m"
    return node


#: Caches end between N = 65536 and N = 524288 lanes (`lif_training` has the largest).
CPU_ROWS = (
    *(Row("LIFNode", t, 65536, inductor=t < 256) for t in (4, 16, 64, 256)),
    *(Row("LIFNode", 64, n) for n in (4096, 16384)),
    Row("LIFNode", 64, 65536, training=False),
    Row("LIFNode", 64, 65536, dtype=torch.bfloat16),
    *(Row(name, 64, 65536) for name in ("ParametricLIFNode", "CUBALIFNode", "ALIFNode", "EIFNode")),
    *(Row(name, 64, 65536) for name in OTHERS),
)
NODES = ("LIFNode", "ParametricLIFNode", "CUBALIFNode", "ALIFNode", "MPBNLIFNode", "EIFNode")
LANES = 1 << 20
#: Of every neuron: T, then inference and 16 bits; of one: N. Inductor to T = 16, and once at T = 64.
GPU_ROWS = (
    *(Row(n, t, LANES, inductor=t <= 16 or (n, t) == ("LIFNode", 64)) for n in NODES for t in (4, 16, 64, 256)),
    *(Row("LIFNode", 64, n, inductor=False) for n in (1 << 12, 1 << 16, 1 << 22)),
    *(Row(n, 64, LANES, dtype=d, inductor=False) for n in NODES for d in (torch.float16, torch.bfloat16)),
    *(Row(n, 64, LANES, training=False, inductor=n == "LIFNode") for n in NODES),
    *(Row("LIFNode", 64, LANES, training=False, dtype=d, inductor=False) for d in (torch.float16, torch.bfloat16)),
    *(Row(n, 16, LANES) for n in OTHERS),
)
#: cheap, one of each kind
CHECKED = (
    "LIFNode T=16 N=65536",
    "LIFNode T=64 N=4096",
    "LIFNode T=64 N=65536",
    "LIFNode T=64 N=65536 inference",
    "ParametricLIFNode T=64 N=65536",
)


def rows(device: torch.device) -> dict[str, Row]:
    """By name, those whose neuron is here."""
    missing = {name for name, (library, _) in OTHERS.items() if importlib.util.find_spec(library) is None}
    for name in sorted(missing):
        print(f"{name}: not installed, no row")
    return {r.name: r for r in (CPU_ROWS if device.type == "cpu" else GPU_ROWS) if r.neuron not in missing}


def spikingjelly(name: str) -> nn.Module:
    from spikingjelly.activation_based import neuron as theirs

    return make(name, theirs)


def has_peer(name: str) -> bool:
    """Whether SpikingJelly has this neuron, as far as can be told: without the library its cells stay empty."""
    try:
        from spikingjelly.activation_based import neuron as theirs
    except Exception:  # (an import that fails for whatever reason: the row's maker says which)
        return name not in OTHERS
    return hasattr(theirs, name)


def implementation(name: str, device: torch.device) -> str:
    """Which of its implementations SpikingJelly picked: CUDA where that was built, else Triton; PyTorch on a CPU."""
    from spikingjelly.activation_based.functional.neuron import neuron_implementation

    kind = {"LIFNode": "lif", "ParametricLIFNode": "plif", "EIFNode": "eif"}.get(name)
    return str(neuron_implementation(kind, device)["implementation"]) if kind else "torch"


def makers(row: Row, x: Tensor, grad: Tensor) -> dict[str, Callable[[], h.Step]]:
    found: dict[str, Callable[[], h.Step]] = {"eager": lambda: step_of(row, make(row.neuron), None, x, grad)}
    found["snn"] = lambda: step_of(row, make(row.neuron), snn, x, grad)
    if row.inductor:
        found["inductor"] = lambda: step_of(row, make(row.neuron), "inductor", x, grad)
    if has_peer(row.neuron):
        found["spikingjelly"] = lambda: step_of(row, spikingjelly(row.neuron), None, x, grad)
    return found


def step_of(row: Row, module: nn.Module, backend: object, x: Tensor, grad: Tensor) -> h.Step:
    module = moved(copy.deepcopy(module), x.device, row.dtype)
    run = module if backend is None else torch.compile(module, backend=backend)  # type: ignore[call-overload]

    def step() -> list[Tensor]:
        module.reset()
        if not row.training:
            with torch.no_grad():
                return [run(x)]
        x.grad = None
        y = run(x)
        y.backward(grad)
        return [y, x.grad]  # type: ignore[list-item]

    return step


@contextlib.contextmanager
def recurrences() -> Iterator[list[object]]:
    """What is compiled inside: `Recurrence` and `SteppedRecurrence`."""
    found: list[object] = []

    def collect(report) -> None:  # type: ignore[no-untyped-def]
        found.extend([*report.recurrences, *report.stepped])

    backend.listeners.append(collect)
    try:
        yield found
    finally:
        backend.listeners.remove(collect)


def bytes_moved(compiled: list[object], row: Row, x: Tensor) -> float:
    """Of a call, by the plan of its kernels.

    A program of several kernels has no such plan: what its equations must move counts (x, spikes; backward: x, cotangent and
    gradient).
    """
    if len(compiled) != 1 or not hasattr(compiled[0], "step"):
        return (5 if row.training else 2) * x.nbytes
    forward, backward = traffic(compiled[0])  # type: ignore[arg-type]
    return (forward + backward * row.training) * x.numel()


def copies(x: Tensor) -> tuple[Callable[[], object], int]:
    """A copy of a tensor of x's size (on a GPU of `COPIED` bytes at least), and the bytes that it moves."""
    size = x.nbytes if x.device.type == "cpu" else max(x.nbytes, COPIED)
    source, target = (torch.empty(size // 4, device=x.device).normal_() for _ in range(2))
    return lambda: target.copy_(source), 2 * size


def measure(name: str, row: Row, device: torch.device) -> list[dict[str, str]]:
    torch.manual_seed(0)
    x = (torch.randn(row.shape, dtype=row.dtype, device=device) * 2.0).requires_grad_(row.training)
    grad = torch.randn_like(x)
    with recurrences() as compiled:
        contest = h.contest(makers(row, x, grad), device, row.limits(device), name)
    moved = bytes_moved(compiled, row, x)
    copied, copied_bytes = copies(x)
    times = h.interleaved({**contest.steps, "copy": copied}, device)
    median = h.medians(times)
    bandwidth = copied_bytes / median["copy"]

    def values(framework: str) -> dict[str, str]:
        agreement = contest.agreement[framework]
        return {
            "first_call_s": f"{contest.first[framework]:.1f}",
            **h.summary(times[framework]),
            "speed_vs_eager": f"{median['eager'] / median[framework]:.2f}",
            "equal_spikes": f"{agreement.equal:.4f}",
            "gradient_error": f"{agreement.gradient:.0e}",
            "moved_MB": f"{moved / 1e6:.1f}",
            "copy_GB_s": f"{bandwidth / 1e9:.0f}",
            "of_copy": f"{moved / median[framework] / bandwidth:.2f}",
            "implementation": implementation(row.neuron, device) if framework == "spikingjelly" else "",
        }

    return contest.rows({"row": name}, values)


def check() -> None:
    """Rerun `CHECKED`; exit with 1 where the speed against eager or Inductor fell by more than a quarter."""
    committed = {(r["row"], r["framework"]): float(r["median_ms"]) for r in read("neurons_cpu") if r["median_ms"]}
    failed = False
    for row in (r for r in CPU_ROWS if r.name in CHECKED):
        now = {r["framework"]: float(r["median_ms"]) for r in measure(row.name, row, torch.device("cpu")) if r["median_ms"]}
        for peer in (p for p in ("eager", "inductor") if p in now):
            before, after = committed[row.name, peer] / committed[row.name, "snn"], now[peer] / now["snn"]
            is_slower = after < 0.75 * before
            failed |= is_slower
            print(f"{row.name}: {after:.2f} times {peer}, committed {before:.2f}{'  SLOWER' if is_slower else ''}", flush=True)
    raise SystemExit(failed)


COLUMNS = ["row", "framework", "first_call_s", "median_ms", "speed_vs_eager", "equal_spikes", "gradient_error", "of_copy"]


def main() -> None:
    parser = h.arguments(__doc__)
    parser.add_argument("--check", action="store_true", help="compare a few rows with the committed results (CPU)")
    args = parser.parse_args()
    if args.check:
        check()
    h.run("neurons", rows, measure, COLUMNS, args)


if __name__ == "__main__":
    main()
