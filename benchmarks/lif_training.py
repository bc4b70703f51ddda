"""A LIF layer's training step (forward and backward) beside eager, Inductor and the memory floor, in one run.

    python benchmarks/lif_training.py [--quick]

T=64, fp32, sigmoid surrogate. The floor is five tensors of [T, N] read or written, 2.5 times the copy of one tensor that is
measured in the same run. Before anything is timed, spikes must equal eager's and gradients agree.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from _harness import first_call, interleaved, lif_index, lif_unbind, machine, markdown, summary, write

import snn_compile  # noqa: F401  (registers the backend in a source tree)

STEPS = 64


def training_step(function, x: torch.Tensor, grad: torch.Tensor):
    def step():
        x.grad = None
        y = function(x)
        y.backward(grad)
        return y

    return step


def measure(lanes: int, repeats: int, device: str) -> list[dict[str, str]]:
    torch.manual_seed(0)
    x = (torch.randn(STEPS, lanes, device=device) * 2).requires_grad_()
    grad = torch.randn(STEPS, lanes, device=device)
    copy = torch.empty_like(grad)
    torch._dynamo.reset()
    steps, first = {}, {}
    for name in ("snn", "inductor"):
        steps[name] = training_step(torch.compile(lif_unbind, backend=name), x, grad)
        _, first[name] = first_call(steps[name])
        torch._dynamo.reset()
    steps["eager unbind"] = training_step(lif_unbind, x, grad)
    if lanes <= 131072:  # (quadratic in T, it takes seconds a step beyond)
        steps["eager x[t]"] = training_step(lif_index, x, grad)
    check(steps, x)
    steps["copy of one tensor"] = lambda: copy.copy_(grad)
    times = interleaved(steps, repeats)
    floor = 2.5 * statistics.median(times["copy of one tensor"])
    reference = statistics.median(times["snn"])
    rows = []
    for name, values in times.items():
        median = statistics.median(values)
        row = {"N": str(lanes), "what": name, **summary(values), "first_call_s": f"{first[name]:.1f}" if name in first else ""}
        row |= {"snn_is_faster_by": f"{median / reference:.2f}", "times_floor": f"{median / floor:.2f}", **machine()}
        rows.append(row)
    return rows


def check(steps: dict, x: torch.Tensor) -> None:
    """Spikes bit for bit, gradients to rounding."""
    expected = steps["eager unbind"]().detach()
    expected_grad = x.grad.clone()
    for name in ("snn", "inductor"):
        got = steps[name]().detach()
        assert torch.equal(got, expected), f"{name}: spikes differ from eager"
        torch.testing.assert_close(x.grad, expected_grad, rtol=1e-4, atol=1e-5)


def peak_memory(lanes: int) -> float:
    """Peak of one compiled training step over what x, spikes and both gradients need (1.0: nothing else), in a process."""
    here = str(Path(__file__).parent)
    code = f"""
import resource, sys, torch
sys.path[:0] = [{here!r}, {str(Path(here).parent)!r}]
import snn_compile
from _harness import lif_unbind
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = (4096,) if args.quick else (131072, 524288)
    rows = [row for lanes in sizes for row in measure(lanes, args.repeats, device)]
    print(markdown(rows, ["N", "what", "median_ms", "min_ms", "max_ms", "snn_is_faster_by", "times_floor", "first_call_s"]))
    if device == "cpu" and sys.platform.startswith("linux"):
        ratio = peak_memory(sizes[-1])
        print(f"\npeak memory of a training step at N={sizes[-1]}: {ratio:.3f} x (x, spikes and their gradients)")
        rows.append({**dict.fromkeys(rows[0], ""), "N": str(sizes[-1]), "what": "peak memory ratio", "median_ms": f"{ratio:.3f}"})
    if not args.quick:
        print(write(f"lif_training_{device}", rows))


if __name__ == "__main__":
    main()
