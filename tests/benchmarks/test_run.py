"""From rows to files: one row's failure, rows measured anew, no GPU, a GPU's chapter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import _device
import _harness as h
import _results
import pytest
import torch
from _gate import Refused

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(_results, "RESULTS", tmp_path)
    return tmp_path


def rows(device: torch.device) -> dict[str, float]:
    return {"fast": 1.0, "wrong": 0.0, "slow": 2.0}


def measure(name: str, row: float, device: torch.device) -> list[dict[str, str]]:
    if not row:
        raise Refused("spikes differ")
    return [{"row": name, "framework": "snn", "median_ms": f"{row}"}]


def run(*arguments: str, measure=measure) -> None:
    h.run("neurons", rows, measure, ["row", "median_ms"], h.arguments("Rows.").parse_args(arguments))


def test_a_refused_row_does_not_cost_the_others_theirs(results):
    with pytest.raises(SystemExit, match="wrong: Refused: spikes differ"):
        run()
    assert [r["row"] for r in _results.read("neurons_cpu")] == ["fast", "slow"]


def test_named_rows_are_written_with_update_only(results):
    run("fast", "slow")
    assert not list(results.iterdir())
    run("fast", "slow", "--update")
    run("fast", "--update", measure=lambda *_: [{"row": "fast", "framework": "snn", "median_ms": "9", "versions": "x"}])
    assert [(r["row"], r["median_ms"], r["versions"]) for r in _results.read("neurons_cpu")] == [
        ("fast", "9", "x"),
        ("slow", "2.0", ""),
    ]


@pytest.mark.parametrize("script", ["run.py", "memory.py"])
def test_no_gpu_is_one_sentence(script):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / script), "--device", "cuda"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == _device.NO_GPU


def test_an_unknown_part_is_named():
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--device", "cuda", "loss_curves"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no part 'loss_curves' on cuda" in done.stderr
