"""The device that is measured: chosen on the command line, timed by its own clock, described for the reader."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

CPU = torch.device("cpu")
#: how the CSV files of a device end (torch calls ROCm's devices `cuda`, too)
SUFFIX = {"cpu": "cpu", "cuda": "gpu"}
NO_GPU = (
    "No GPU: torch.cuda.is_available() is False here; run `make bench-gpu` on a machine with a CUDA or ROCm device and a torch "
    "built for it (`make bench` measures the CPU)."
)
LIBRARIES = ("triton", "spikingjelly", "snntorch", "norse", "sinabs", "spyx", "jax")
#: bytes written between two calls that are timed, more than the caches of a GPU hold
FLUSHED = 256 << 20


def chosen(name: str) -> torch.device:
    """The device of this name, or one sentence and exit code 1. Convolutions do not round to TF32: results are compared."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


def moved(module: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """The module on the device, and with it the parameters of Norse's cells: tuples of tensors, which `to` leaves on the CPU."""
    for part in module.modules():
        values = getattr(part, "p", None)
        if isinstance(values, tuple) and hasattr(values, "_replace"):
            tensors = {name: v for name, v in values._asdict().items() if isinstance(v, torch.Tensor)}
            part.p = values._replace(**{name: v.to(device, dtype) for name, v in tensors.items()})
    return module.to(device, dtype)


class Clock:
    """``clock(function)``: the seconds of one call.

    On a GPU these lie between two events of its stream, with cold caches. The call before, which is not timed, and the write to
    the caches are still queued when the timed call begins: what counts is the larger of its work on the GPU and its launches.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        if self.is_gpu:
            self.flushed = torch.empty(FLUSHED, dtype=torch.int8, device=device)
            self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, function: Callable[[], object]) -> float:
        if not self.is_gpu:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        self.flushed.zero_()
        self.start.record()
        function()
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) / 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device = CPU) -> dict[str, str]:
    """What a reader needs to place the numbers."""
    name, driver = (_gpu(), f"{_driver()}, ") if device.type == "cuda" else (_cpu(), "")
    today = datetime.date.today().isoformat()
    return {"machine": name, "torch": torch.__version__, "date": today, "versions": driver + _libraries()}


def _cpu() -> str:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads"


def _gpu() -> str:
    return f"{torch.cuda.get_device_name()}, {'ROCm' if torch.version.hip else 'CUDA'} {torch.version.hip or torch.version.cuda}"


@functools.cache
def _driver() -> str:
    """The driver as its own tool names it; a GPU without that tool is measured all the same."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        out = ""
    return f"driver {(out.splitlines() or ['unknown'])[0].strip()}"


@functools.cache
def _libraries() -> str:
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
