"""Peak memory of one call against T: ``python benchmarks/memory.py`` (Linux; each point in its own process).

What a call takes beyond what is held before it, after a first call: the high-water mark of resident memory, reset before
the call. Inference of the per-step convolutional net on 128 images of 32x32, and a training step of one LIF layer of 65,536
neurons.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import _harness as h
import torch
from networks import Convolutional

from snn_compile.backend import snn
from snn_compile.lowering.result_memory import blocks

STEPS = (8, 16, 32, 64, 128)
#: Inductor unrolls: from here on its first call takes minutes
INDUCTOR_UP_TO = 16


def inference(framework: str, steps: int) -> Callable[[], object]:
    torch.manual_seed(0)
    net, x = Convolutional(32).eval(), torch.rand(steps, 128, 1, 32, 32) * 2
    run = compiled(net, framework, steps)

    def call() -> object:
        with torch.no_grad():
            return run(x)

    return call


def training(framework: str, steps: int) -> Callable[[], object]:
    x = torch.randn(steps, 65536, requires_grad=True)
    run = compiled(h.lif_unbind, framework, steps)
    cotangent = torch.ones(steps, 65536)
    return lambda: torch.autograd.grad(run(x), x, cotangent)


WORK = {"conv net, inference": inference, "LIF layer, training": training}


def compiled(function: Callable[..., object], framework: str, steps: int) -> Callable[..., object]:
    if framework == "eager":
        return function
    if framework == "inductor":
        return torch.compile(function, backend="inductor")
    return torch.compile(function, backend=snn, options={"time_chunk": "auto" if framework == "snn" else steps})


def kilobytes(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))


def peak(call: Callable[[], object]) -> float:
    """MiB that a call takes beyond what is resident before it."""
    call()
    blocks.clear()  # what our allocator keeps for the next call is part of what a call takes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = kilobytes("VmRSS")
    call()
    return (kilobytes("VmHWM") - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--point", nargs=3, metavar=("WORK", "FRAMEWORK", "T"), help=argparse.SUPPRESS)
    parser.add_argument("--only", metavar="FRAMEWORK", help="measure its rows anew and keep the others")
    args = parser.parse_args()
    if args.point:
        work, framework, steps = args.point
        print(f"{peak(WORK[work](framework, int(steps))):.0f}")
        return
    file = h.RESULTS / "memory_cpu.csv"
    kept = [r for r in csv.DictReader(file.open()) if r["framework"] != args.only] if args.only else []
    rows = []
    # every block of a tensor's size is given back to the system as soon as it is free, or the next call would find it there
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for work in WORK:
        for framework in ("eager", "inductor", "snn, all steps at once", "snn"):
            if args.only and framework != args.only:
                continue
            if work == "LIF layer, training" and framework == "snn, all steps at once":
                continue  # (a training step is never cut)
            for steps in STEPS if framework != "inductor" else [t for t in STEPS if t <= INDUCTOR_UP_TO]:
                command = [sys.executable, __file__, "--point", work, framework, str(steps)]
                out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
                rows.append({"work": work, "framework": framework, "T": str(steps), "peak_MiB": out.split()[-1], **h.machine()})
                print(h.markdown(rows[-1:], ["work", "framework", "T", "peak_MiB"]).splitlines()[-1], flush=True)
    h.write("memory_cpu", sorted([*kept, *rows], key=lambda r: list(WORK).index(r["work"])))


if __name__ == "__main__":
    main()
