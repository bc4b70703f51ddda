"""The checks of `test_interpreted`, on a CUDA or ROCm device."""

from __future__ import annotations

import pytest
import torch

from snn_compile.lowering.launch import run_forward
from snn_compile.lowering.triton.target import TritonTarget
from tests.lowering.channel_layers import LAYERS
from tests.lowering.triton import channel_checks
from tests.lowering.triton.cases import CASES, recurrence
from tests.lowering.triton.checks import check

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("n", [1, 3, 63, 1000, 1 << 17])
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 8, 9, 63])
def test_any_number_of_steps_and_lanes(steps, n):
    check("lif", steps=steps, shape=(n,), device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case_in_every_dtype(name, dtype):
    check(name, dtype, steps=17, shape=(16, 33), device="cuda")
    check(name, dtype, steps=17, shape=(16, 32), device="cuda", reverse=True)


@pytest.mark.parametrize("time_dim", [0, 1, -1])
@pytest.mark.parametrize("layout", ["strided", "transposed", "channels_last", "broadcast", "unaligned"])
@pytest.mark.parametrize("name", ["parametric", "refractory"])
def test_every_layout(name, layout, time_dim):
    check(name, shape=(2, 32, 16), layout=layout, time_dim=time_dim, device="cuda")


def test_more_elements_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB")
    rec = recurrence(CASES["integrator"], torch.bfloat16)
    x = torch.randn((3, (1 << 30) + 8), device="cuda", dtype=torch.bfloat16)
    v = torch.zeros_like(x[0])
    y, final = run_forward(rec, TritonTarget(), [v, x], 3)
    for t in range(3):
        v = v * 0.5 + x[t]
        assert torch.equal(y[t], v)
    assert torch.equal(final, v)


def test_more_lanes_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB")
    rec = recurrence(CASES["integrator"], torch.bfloat16)
    x = torch.randn((1, (1 << 31) + 8), device="cuda", dtype=torch.bfloat16)
    (y, final) = run_forward(rec, TritonTarget(), [torch.ones_like(x[0]), x], 1)
    assert torch.equal(y[0], x[0] + 0.5) and torch.equal(final, y[0])


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_channel_kernels(layer, tiled):
    channel_checks.check(layer, "odd sizes", tiled=tiled, device="cuda", calls=2)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided", "unaligned"])
@pytest.mark.parametrize("size", channel_checks.SHAPES)
def test_channel_kernels_of_every_size(size, layout, tiled):
    channel_checks.check("hard reset", size, layout, tiled, "cuda")


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(8, 32, 128, 16, 16), (4, 64, 132, 32, 32), (16, 256, 512)], ids=str)
def test_channel_kernels_of_the_sizes_in_papers(shape, layout):
    channel_checks.check_statistics(shape, layout, "cuda")
