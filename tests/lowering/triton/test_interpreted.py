"""Kernels in Triton's interpreter, on CPU tensors, against eager: forward bit for bit, gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from snn_compile.lowering.layout import Layout
from snn_compile.lowering.triton import target
from snn_compile.lowering.triton.codegen import generate
from snn_compile.lowering.triton.text import KernelText
from tests.lowering.triton import checks
from tests.lowering.triton.cases import CASES, recurrence
from tests.lowering.triton.checks import check


@pytest.mark.parametrize("n", [1, 3, 63, 1000])
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 8, 9, 63])
def test_any_number_of_steps_and_lanes(interpreted, steps, n):
    interpreted(check, "lif", steps=steps, shape=(n,))


@pytest.mark.parametrize("steps", [1, 5, 17])
@pytest.mark.parametrize("name", CASES)
def test_every_case(interpreted, name, steps):
    interpreted(check, name, steps=steps, shape=(2, 3, 7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_dtype(interpreted, name, dtype):
    interpreted(check, name, dtype, steps=11)


def _one_source_in_two_dtypes() -> None:
    dtypes = (torch.float32, torch.float64)
    single, double = (generate(recurrence(CASES["delayed"], d), "backward", Layout(1, (1,) * 12)).source for d in dtypes)
    assert single == double, "these are two sources: take another case"
    for dtype in dtypes:
        check("delayed", dtype, steps=17)


def test_scratch_memory_of_one_source_in_two_dtypes(interpreted):
    interpreted(_one_source_in_two_dtypes)


@pytest.mark.parametrize("time_dim", [0, 1, -1])
@pytest.mark.parametrize("layout", ["strided", "transposed", "channels_last", "broadcast", "unaligned"])
@pytest.mark.parametrize("name", ["parametric", "refractory"])
def test_every_layout(interpreted, name, layout, time_dim):
    interpreted(check, name, shape=(2, 3, 4), layout=layout, time_dim=time_dim)


@pytest.mark.parametrize("name", CASES)
def test_time_read_backwards(interpreted, name):
    interpreted(check, name, reverse=True, time_dim=1)


def _run_with_an_error() -> None:
    """The check itself, against a kernel that adds where it should subtract."""

    def wrong(*args: Any) -> KernelText:
        text = generate(*args)
        return replace(text, source=text.source.replace("x - v", "x + v"))

    try:
        target.generate, checks.TARGET = wrong, target.TritonTarget()
        check("lif")
    finally:
        target.generate, checks.TARGET = generate, target.TritonTarget()


def test_the_check_notices_a_wrong_kernel(interpreted):
    with pytest.raises(AssertionError, match="values differ"):
        interpreted(_run_with_an_error)


def _wide_lanes() -> None:
    """64-bit lane indices: the same results as with 32-bit ones."""
    before = target._INT32_LANES
    try:
        target._INT32_LANES = 0
        check("parametric", shape=(2, 3, 7), layout="channels_last")
        check("lif", shape=(63,))
    finally:
        target._INT32_LANES = before


def test_lanes_beyond_32_bits(interpreted):
    interpreted(_wide_lanes)
