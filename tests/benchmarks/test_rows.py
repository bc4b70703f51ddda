"""The rows of a GPU, made small, on the CPU: every builder, gate and clock that runs there."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess

import _device
import _harness as h
import folding
import memory
import networks
import neurons
import open_neuromorphic
import pytest
import stepped
import torch
from network_models import ConvNorm, MakeNeuron, SpikingJellyLIF, multi_step_lif
from torch import Tensor, nn

CPU, META = torch.device("cpu"), torch.device("meta")
STEPS = 4


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(h, "ROUNDS", {"cpu": 1, "cuda": 1})


def small(row: neurons.Row) -> neurons.Row:
    lanes = neurons.CHANNELS * 256 if row.neuron.startswith("MPBN") else 64
    return dataclasses.replace(row, steps=STEPS, lanes=lanes, inductor=row.inductor and row.neuron == "LIFNode")


def is_tried(row: neurons.Row) -> bool:
    """Every neuron once; inference and 16 bits with one of them."""
    return row.neuron == "LIFNode" or (row.neuron not in neurons.OTHERS and row.training and row.dtype == torch.float32)


#: what is left of the GPU's rows when all have one size
NEURONS = {(r.neuron, r.training, r.dtype): small(r) for r in neurons.GPU_ROWS if is_tried(r)}


def frameworks(rows: list[dict[str, str]]) -> list[str]:
    return [r["framework"] for r in rows]


@pytest.mark.slow
@pytest.mark.parametrize("row", [pytest.param(r, id=r.name) for r in NEURONS.values()])
def test_neurons(fresh, row):
    found = neurons.measure(row.name, row, CPU)
    assert {"eager", "snn"} <= set(frameworks(found))
    ours = next(r for r in found if r["framework"] == "snn")
    assert float(ours["median_ms"]) > 0 and ours["of_copy"]
    assert ours["compiled"] == ("left to Inductor" if row.neuron.startswith("MPBN") else "1 kernels")  # (few steps with sums)


def test_bytes_moved_are_those_of_the_plan(fresh):
    row = neurons.Row("LIFNode", STEPS, 64, inductor=False)
    found = neurons.measure(row.name, row, CPU)
    assert {float(r["moved_MB"]) for r in found} == {round(5 * STEPS * 64 * 4 / 1e6, 1)}
    x = torch.zeros(STEPS, 64)
    assert neurons.bytes_moved([], row, x) == 5 * x.nbytes
    assert neurons.bytes_moved([], dataclasses.replace(row, training=False), x) == 2 * x.nbytes


class TwoLayers(nn.Sequential):
    """Convolution, batch norm, neuron, and their rates: the parts of the residual network, as deep as a test can wait for."""

    def __init__(self, neuron: MakeNeuron = lambda: multi_step_lif) -> None:
        super().__init__(ConvNorm(neuron, 1, 4), ConvNorm(neuron, 4, 10))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((0, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("training, autocast", [(True, torch.bfloat16), (False, torch.float16)])
def test_networks(fresh, training, autocast):
    peer = lambda: TwoLayers(SpikingJellyLIF)  # noqa: E731
    network = networks.Network(TwoLayers, (STEPS, 2, 1, 8, 8), training=training, autocast=autocast, peer=peer, is_deep=True)
    found = networks.measure("two layers", network, CPU)
    assert frameworks(found) == ["eager", "inductor", "snn", "spikingjelly"]
    assert next(r["compiled"] for r in found if r["framework"] == "snn").startswith("2 kernels")


@pytest.mark.slow
def test_stepped(fresh):
    case = stepped.Case(lambda: stepped.RecurrentLIF(6, 5), (40, 3, 6), inductor=False, scale=2.5)
    assert frameworks(stepped.measure("recurrent LIF", case, CPU)) == ["eager", "snn"]


@pytest.mark.slow
def test_folding(fresh, monkeypatch):
    monkeypatch.setattr(folding, "ROUNDS", 1)
    found = folding.measure("small", (STEPS, 2, 3, 2, 2), CPU)
    assert frameworks(found) == 2 * ["eager", "inductor", "snn"]
    assert all(r["compiled"] == "1 kernels" for r in found if r["framework"] == "snn")
    assert all(float(r["cost_vs_lif"]) == 1 for r in found if r["neuron"] == folding.WITHOUT)


@pytest.mark.slow
def test_open_neuromorphic(fresh, monkeypatch):
    monkeypatch.setattr(open_neuromorphic, "STEPS", STEPS)
    found = open_neuromorphic.measure("N=8", 8, CPU)
    assert frameworks(found)[:2] == ["eager", "snn"]
    assert set(frameworks(found)) == {*open_neuromorphic.MAKERS, "spyx"}


def test_memory_of_one_process(monkeypatch):
    monkeypatch.setattr(memory, "STEPS", (2, STEPS))
    monkeypatch.setattr(memory, "LANES", {"cpu": 64})
    assert len(memory.peaks("LIF layer, training", "snn", CPU)) == 2


def models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Every model of the GPU's rows, with its input's shape there."""
    found = {f"{n.neuron}": (neurons.make(n.neuron), n.shape) for n in NEURONS.values()}
    for name, network in {**networks.NETWORKS, **networks.GPU_NETWORKS}.items():
        if not network.library or importlib.util.find_spec(network.library):
            found[name] = (network.make(), network.shape)
    return {**found, **{name: (case.make(), case.shape) for name, case in stepped.CASES.items()}}


def test_every_tensor_is_on_the_device():
    """A model on the meta device, which refuses a tensor of the CPU as a GPU does."""
    for name, (module, shape) in models().items():
        with torch.no_grad():
            out = _device.moved(module, META)(torch.empty(shape, device=META))
        assert out.device == META, name
    for network in networks.NETWORKS.values():
        assert {t.device for t in networks.inputs(network, META)} == {META}


def test_the_machine_is_described(monkeypatch):
    """By what torch and the driver's tool say, with what is installed."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    answer = subprocess.CompletedProcess([], 0, stdout="580.159.04\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: answer)
    _device._driver.cache_clear()
    about = _device.machine(torch.device("cuda"))
    _device._driver.cache_clear()
    assert about["machine"].startswith("NVIDIA H200, CUDA")
    assert about["versions"].startswith("driver 580.159.04, triton ")
    assert "driver" not in _device.machine(CPU)["versions"]


@pytest.mark.gpu
def test_times_on_a_gpu_are_those_of_its_work(fresh):
    device = _device.chosen("cuda")
    row = neurons.Row("LIFNode", STEPS, 1 << 16, inductor=False)
    ours = next(r for r in neurons.measure(row.name, row, device) if r["framework"] == "snn")
    assert 0 < float(ours["of_copy"]) < 1.5
    assert memory.peak(lambda: torch.empty(1 << 20, device=device), device) >= 4
