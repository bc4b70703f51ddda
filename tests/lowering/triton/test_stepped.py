"""The regions of a step with calls are Triton kernels, too: compiled for a GPU that is not here."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from snn_compile.lowering.layout import Layout
from snn_compile.lowering.triton.codegen import generate
from tests.lowering.triton.assembly import compile_for
from tests.passes.test_stepped import LIF, recurrent_lif, regions, traced


@pytest.mark.parametrize("device", ["sm_90", "gfx942"])
def test_regions_compile(device):
    r = traced(recurrent_lif, *LIF)
    kernels = [u.kernel for program in (r.forward, r.backward) for u in regions(program)]
    assert len(kernels) == 2
    for kernel in kernels:
        text = generate(kernel, "forward", Layout(1, (1,) * (len(kernel.xs) + len(kernel.consts) + len(kernel.ys))))
        assert "arg" not in text.source  # the user's names, in the backward too
        assert compile_for(device, text).spills == 0
