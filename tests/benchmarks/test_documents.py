"""Pages and pictures follow the CSV files: a GPU has its chapter where it was measured; `--check` compares with what is there."""

from __future__ import annotations

import shutil

import _results
import charts
import neurons
import pytest
import render
from _gate import NOTHING

COMMITTED = _results.RESULTS


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A copy of what is committed, without a GPU's files."""
    for path in COMMITTED.glob("*.csv"):
        if not path.stem.endswith("_gpu"):
            shutil.copy(path, tmp_path)
    monkeypatch.setattr(_results, "RESULTS", tmp_path)
    return tmp_path


@pytest.fixture
def with_gpu(results):
    """The CPU's rows under a GPU's name, with a peer that was not there."""
    about = {"machine": "NVIDIA H200, CUDA 13.0", "versions": "driver 580, triton 3.6.0"}
    for name, *_ in render.SECTIONS:
        rows = [{**r, **about} for r in _results.read(f"{name}_cpu")]
        absent = {column: "" if column.endswith(("_ms", "_s", "eager")) else value for column, value in rows[-1].items()}
        if name != "memory":
            rows.append({**absent, "framework": "spikingjelly"})
        rows[1]["compiled"] = NOTHING
        _results.write(f"{name}_gpu", [{k: v.replace("N=65536", "N=1048576") for k, v in r.items()} for r in rows])


def test_without_a_gpu_there_is_no_chapter(results):
    assert render.gpu() == "" and render.readme_gpu() == ""
    assert "No GPU has been at hand" in render.document()


def test_a_gpu_has_its_chapter(with_gpu):
    document = render.document()
    chapter = document[document.index("## On a GPU") :]
    assert "NVIDIA H200, CUDA 13.0" in chapter and "driver 580" in chapter
    assert f"snn ({NOTHING})" in chapter and "| spikingjelly |  |" in chapter
    for name in ("lif", "networks", "memory"):
        assert f"pictures/{name}_gpu.png" in chapter
    assert "No GPU has been at hand" not in document
    assert "networks_gpu.png" in render.readme_gpu()


def test_pictures(with_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "PICTURES", tmp_path / "pictures")
    charts.main()
    of_a_device = {f"{name}{ending}" for name in ("lif", "networks", "memory") for ending in ("", "_gpu")}
    assert {p.stem for p in charts.PICTURES.iterdir()} == {*of_a_device, "first_call", "loss_curves"}


@pytest.mark.parametrize("ratio, code", [(1.0, 0), (0.8, 0), (0.7, 1)])
def test_check_fails_below_three_quarters(results, monkeypatch, ratio, code):
    committed = _results.read("neurons_cpu")

    def measure(name, row, device):
        mine = [r for r in committed if r["row"] == name]
        return [{**r, "median_ms": str(float(r["median_ms"]) / (ratio if r["framework"] == "snn" else 1))} for r in mine]

    monkeypatch.setattr(neurons, "measure", measure)
    with pytest.raises(SystemExit) as done:
        neurons.check()
    assert done.value.code == code
