"""A LIF layer's training step (forward and backward) beside eager, Inductor and the memory floor, in one run.

    python benchmarks/lif_training.py [--quick]

T=64, fp32, sigmoid surrogate. The floor is five tensors of [T, N] read or written, 2.5 times the copy of one tensor that is
measured in the same run. Before anything is timed, spikes must equal eager's and gradients agree. (On a GPU: `neurons.py`.)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import _harness as h
import torch
from _device import machine
from _gate import Limits
from _loops import lif_index, lif_unbind
from _results import markdown, write

from snn_compile.backend import snn

STEPS = 64


def training_step(function, x: torch.Tensor, grad: torch.Tensor) -> h.Step:
    def step():
        x.grad = None
        y = function(x)
        y.backward(grad)
        return [y, x.grad]

    return step


def measure(lanes: int, rounds: int) -> list[dict[str, str]]:
    torch.manual_seed(0)
    x = (torch.randn(STEPS, lanes) * 2).requires_grad_()
    grad = torch.randn(STEPS, lanes)
    copy = torch.empty_like(grad)
    makers = {
        name: lambda backend=backend: training_step(torch.compile(lif_unbind, backend=backend), x, grad)
        for name, backend in (("snn", snn), ("inductor", "inductor"))
    }
    makers = {"eager": lambda: training_step(lif_unbind, x, grad), **makers}
    contest = h.contest(makers, x.device, Limits(), f"N={lanes}")
    steps = {"eager unbind" if name == "eager" else name: step for name, step in contest.steps.items()}
    if lanes <= 131072:  # (quadratic in T, it takes seconds a step beyond)
        steps["eager x[t]"] = training_step(lif_index, x, grad)
    times = h.interleaved({**steps, "copy of one tensor": lambda: copy.copy_(grad)}, rounds=rounds)
    median = h.medians(times)
    floor = 2.5 * median["copy of one tensor"]
    rows = []
    for name, values in times.items():
        first = f"{contest.first[name]:.1f}" if name in ("snn", "inductor") else ""
        row = {"N": str(lanes), "what": name, **h.summary(values), "first_call_s": first}
        row |= {"snn_is_faster_by": f"{median[name] / median['snn']:.2f}", "times_floor": f"{median[name] / floor:.2f}"}
        rows.append({**row, **machine()})
    return rows


def peak_memory(lanes: int) -> float:
    """Peak of one compiled training step over what x, spikes and both gradients need (1.0: nothing else), in a process."""
    here = str(Path(__file__).parent)
    code = f"""
import resource, sys, torch
sys.path[:0] = [{here!r}, {str(Path(here).parent)!r}]
import snn_compile
from _loops import lif_unbind
f = torch.compile(lif_unbind, backend="snn")
f(torch.randn({STEPS}, 64, requires_grad=True)).sum().backward()
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
x = torch.empty({STEPS}, {lanes}).normal_().requires_grad_()
g = torch.ones({STEPS}, {lanes})
f(x).backward(g)
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return int(out) / (4 * STEPS * lanes * 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small layer, to see that it runs")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    sizes = (4096,) if args.quick else (131072, 524288)
    rows = [row for lanes in sizes for row in measure(lanes, args.repeats)]
    print(markdown(rows, ["N", "what", "median_ms", "min_ms", "max_ms", "snn_is_faster_by", "times_floor", "first_call_s"]))
    if sys.platform.startswith("linux"):
        ratio = peak_memory(sizes[-1])
        print(f"\npeak memory of a training step at N={sizes[-1]}: {ratio:.3f} x (x, spikes and their gradients)")
        rows.append({**dict.fromkeys(rows[0], ""), "N": str(sizes[-1]), "what": "peak memory ratio", "median_ms": f"{ratio:.3f}"})
    if not args.quick:
        print(write("lif_training_cpu", rows))


if __name__ == "__main__":
    main()
