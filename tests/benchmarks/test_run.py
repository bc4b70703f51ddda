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
import render
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


def test_the_document_has_a_chapter_for_a_gpu_that_was_measured(results):
    assert render.gpu() == "" and render.readme_gpu() == ""
    about = {"machine": "NVIDIA H200, CUDA 13.0", "torch": "2.11.0", "date": "2026-11-21", "versions": "driver 580, triton 3.6.0"}
    cells = {"framework": "snn", "first_call_s": "1.0", "step_ms": "2.00", "speed_vs_eager": "9.0", "equal_outputs": "1.000"}
    absent = {**dict.fromkeys(cells, ""), "framework": "spikingjelly"}
    _results.write("networks_gpu", [{"network": "SEW", **values, **about} for values in (cells, absent)])
    chapter = render.gpu()
    assert "NVIDIA H200, CUDA 13.0" in chapter and "driver 580" in chapter
    assert "| SEW | snn | 1.0 | 2.00 | 9.0 | 1.000 |" in chapter
    assert "| SEW | spikingjelly |  |  |  |  |" in chapter
    assert "pictures/networks_gpu.png" in chapter and "Peak memory" not in chapter
    assert "networks_gpu.png" in render.readme_gpu()
