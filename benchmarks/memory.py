"""Peak memory of one call against T: ``python benchmarks/memory.py [--device cuda] [--update] [name ...]``.

What a call takes beyond what is held before it, after a first call. Inference of the per-step convolutional net on 128 images
of 32x32, and a training step of one LIF layer of 65,536 neurons (on a GPU 2^20). CPU (Linux): the high-water mark of resident
memory, reset before the call; each framework in a process of its own. GPU: `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import _harness as h
import torch
from _device import machine, moved
from _loops import lif_unbind
from network_models import Convolutional

from snn_compile.backend import snn
from snn_compile.lowering.result_memory import blocks

STEPS = (8, 16, 32, 64, 128)
#: Inductor unrolls, and its first call takes minutes beyond; what is proportional to T says so in three points
FEWER_STEPS = {"inductor": (8, 16), "snn, all steps at once": (8, 32, 128)}
BATCH, LANES = 128, {"cpu": 1 << 16, "cuda": 1 << 20}


def inference(framework: str, steps: int, device: torch.device) -> Callable[[], object]:
    torch.manual_seed(0)
    net, x = moved(Convolutional(32).eval(), device), torch.rand(steps, BATCH, 1, 32, 32, device=device) * 2
    run = compiled(net, framework, steps)

    def call() -> object:
        with torch.no_grad():
            return run(x)

    return call


def training(framework: str, steps: int, device: torch.device) -> Callable[[], object]:
    x = torch.randn(steps, LANES[device.type], device=device, requires_grad=True)
    run = compiled(lif_unbind, framework, steps)
    cotangent = torch.ones_like(x, requires_grad=False)
    return lambda: torch.autograd.grad(run(x), x, cotangent)


WORK = {"conv net, inference": inference, "LIF layer, training": training}
FRAMEWORKS = ("eager", "inductor", "snn, all steps at once", "snn")


def compiled(function: Callable[..., object], framework: str, steps: int) -> Callable[..., object]:
    if framework == "eager":
        return function
    if framework == "inductor":
        return torch.compile(function, backend="inductor")
    return torch.compile(function, backend=snn, options={"time_chunk": "auto" if framework == "snn" else steps})


def kilobytes(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))


def peak(call: Callable[[], object], device: torch.device) -> float:
    """MiB that a call takes beyond what is held before it."""
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    blocks.clear()  # what our allocator keeps for the next call is part of what a call takes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = kilobytes("VmRSS")
    call()
    return (kilobytes("VmHWM") - before) / 1024


def peaks(work: str, framework: str, device: torch.device) -> list[str]:
    """Of every number of steps, in MiB."""
    found = []
    for steps in FEWER_STEPS.get(framework, STEPS):
        torch._dynamo.reset()
        found.append(f"{peak(WORK[work](framework, steps, device), device):.0f}")
    return found


def in_a_process(work: str, framework: str) -> list[str]:
    # every block of a tensor's size is given back to the system as soon as it is free, or the next call would find it there
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--child", work, framework]
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1].split()


def rows(device: torch.device) -> dict[str, tuple[str, str]]:
    names = [(work, framework) for work in WORK for framework in FRAMEWORKS]
    names.remove(("LIF layer, training", "snn, all steps at once"))  # (a training step is never cut)
    return {": ".join(name): name for name in names}


def measure(name: str, row: tuple[str, str], device: torch.device) -> list[dict[str, str]]:
    work, framework = row
    found = in_a_process(work, framework) if device.type == "cpu" else peaks(work, framework, device)
    return [
        {"work": work, "framework": framework, "T": str(t), "peak_MiB": mebibytes, **machine(device)}
        for t, mebibytes in zip(FEWER_STEPS.get(framework, STEPS), found, strict=True)
    ]


def main() -> None:
    parser = h.arguments(__doc__)
    parser.add_argument("--child", nargs=2, metavar=("WORK", "FRAMEWORK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(*peaks(*args.child, torch.device("cpu")))
        return
    h.run("memory", rows, measure, ["work", "framework", "T", "peak_MiB"], args, key=3)


if __name__ == "__main__":
    main()
