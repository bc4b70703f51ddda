"""Data-parallel training over gloo in two processes: the losses of one process with the whole batch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from snn_compile.lowering.cpp import compiler

pytestmark = pytest.mark.skipif(
    compiler.missing() is not None or not torch.distributed.is_available(), reason="no C++ compiler, or no torch.distributed"
)

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_data_parallel.py"


def losses(world: int) -> dict[str, list[float]]:
    """rank -> losses of the example, started as its docstring says."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, *launch, str(EXAMPLE)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, list[float]] = {}
    for rank, loss in re.findall(r"rank (\d+) epoch \d+ loss ([\d.]+)", run.stdout):
        found.setdefault(rank, []).append(float(loss))
    return found


@pytest.mark.slow
def test_two_processes_train_like_one():
    alone, together = losses(1)["0"], losses(2)
    assert together.keys() == {"0", "1"} and together["0"] == together["1"] and len(alone) == 4
    assert together["0"] == pytest.approx(alone, abs=1e-4)
    assert alone[-1] < alone[0]
