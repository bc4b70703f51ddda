"""Kernels compiled for devices that are not here: no spills, wide accesses, no contraction, none anew for a new T."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton")

from snn_compile.ir.recurrence import Output, Recurrence, TimeSeries
from snn_compile.lowering import launch
from snn_compile.lowering.layout import Layout, Placement
from snn_compile.lowering.ops import is_supported
from snn_compile.lowering.triton.codegen import generate
from snn_compile.lowering.triton.heuristics import lanes_and_steps
from snn_compile.lowering.triton.target import TritonTarget
from snn_compile.lowering.triton.text import KernelText
from snn_compile.passes.trace_step import trace_step
from tests.lowering.triton.assembly import DEVICES, Assembly, compile_for
from tests.lowering.triton.cases import CASES, operands, recurrence

DIRECTIONS = ("forward", "backward")


def contiguous(rec: Recurrence, direction: str, ndim: int = 1) -> KernelText:
    """The kernel for operands that are all contiguous in their innermost dim."""
    tensors = len(rec.carries) + len(rec.xs) + len(rec.consts)
    if direction == "forward":
        tensors += len(rec.ys) + len(rec.finals)
    else:
        needed = [c.init_needs_grad for c in rec.carries] + [s.needs_grad for s in (*rec.xs, *rec.consts)]
        tensors += len(rec.differentiable_ys) + sum(c.differentiable for c in rec.finals) + sum(needed)
    return generate(rec, direction, Layout(ndim, (1,) * tensors))


def accesses(assembly: Assembly) -> list[str]:
    """Every access of global memory, as PTX or the AMD instruction names it."""
    return re.findall(r"(?:ld|st)\.global[\w.:]*|(?:global|buffer|flat)_(?:load|store)_\w+", assembly.text)


def is_wide(access: str) -> bool:
    return access.endswith((".v4.b32", "_dwordx4"))


def fused(assembly: Assembly) -> int:
    return len(re.findall(r"\bfma\.rn\.|\bv_(?:pk_)?(?:fma|fmac|mac|mad)_f\w+", assembly.text))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["lif", "parametric", "synaptic", "refractory"])
def test_nothing_spills(name, device, dtype, record_property):
    if dtype != torch.float32 and device == "sm_80":
        pytest.skip("sm_90 stands for both")
    for direction in DIRECTIONS:
        assembly = compile_for(device, contiguous(recurrence(CASES[name], dtype), direction))
        record_property(f"registers of {name} {direction} in {dtype} on {device}", assembly.registers)
        assert assembly.spills == 0, f"{direction}: {assembly.registers} registers"


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("device", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["lif", "parametric", "refractory"])
def test_a_lane_belongs_to_one_thread(name, device, aligned):
    """Then a thread reads from scratch memory only what it stored there itself."""
    for dtype in (torch.float32, torch.bfloat16):
        text = contiguous(recurrence(CASES[name], dtype), "backward", 2)
        assert "convert_layout" not in compile_for(device, text, aligned=aligned).ttgir


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_accesses_are_128_bits_wide(device, direction, ndim):
    assembly = compile_for(device, contiguous(recurrence(CASES["lif"]), direction, ndim))
    found = accesses(assembly)
    assert len(found) >= 4
    assert all(map(is_wide, found)), found


@pytest.mark.parametrize("device", DEVICES)
def test_unaligned_operands_have_a_kernel_of_their_own(device):
    assembly = compile_for(device, contiguous(recurrence(CASES["lif"]), "forward"), aligned=False)
    assert not any(map(is_wide, accesses(assembly)))


@pytest.mark.parametrize("name", ["lif", "synaptic", "delayed", "integrator"])
@pytest.mark.parametrize("device", DEVICES)
def test_forward_is_not_contracted(device, name):
    """These steps have no division: on AMD its expansion consists of fused multiply-adds."""
    for dtype in (torch.float32, torch.float64):
        assembly = compile_for(device, contiguous(recurrence(CASES[name], dtype), "forward"))
        assert fused(assembly) == 0
        assert not re.search(r"\b(?:mul|add|sub)\.f(?:32|64)", assembly.text)  # without .rn ptxas may contract


@pytest.mark.parametrize("device", DEVICES)
def test_a_division_is_the_only_source_of_fused_operations(device):
    text = contiguous(recurrence(CASES["parametric"]), "forward")
    assembly = compile_for(device, text)
    divisions = len(re.findall(r"\bdiv\.rn\.f32|\bv_div_fmas_f32", assembly.text))
    assert divisions == lanes_and_steps(text.accessed, ())[0]
    assert fused(assembly) == (5 * divisions if device == "gfx942" else 0)


@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
def test_backward_is_not_contracted(device):
    """The fused operations of a backward kernel are those inside of its exponentials."""

    def sigmoid(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.sigmoid(x),)

    spec = {"name": "sigmoid", "carries": [], "xs": [TimeSeries("x", torch.float32)], "consts": []}
    rec = trace_step(sigmoid, ys=[Output("y", torch.float32)], shape=(8,), supported=is_supported, **spec)
    alone = contiguous(rec, "forward")
    inside = fused(compile_for(device, alone)) // lanes_and_steps(alone.accessed, ())[0]
    assert inside > 0
    text = contiguous(recurrence(CASES["lif"]), "backward")
    assert fused(compile_for(device, text)) == inside * math.prod(lanes_and_steps(text.accessed, text.kept))


def test_contraction_would_be_seen(monkeypatch):
    text = contiguous(recurrence(CASES["lif"]), "forward")
    monkeypatch.setattr("tests.lowering.triton.assembly.compile_options", lambda hip: {"enable_fp_fusion": True})
    assert all(fused(compile_for(device, text)) > 0 for device in DEVICES)


# --------------------------------------------------------------------------------------------- new T, new N, new kernel


def variants(name: str, sizes: Sequence[tuple[int, int]]) -> set[str]:
    """What Triton keys its cache of compiled kernels on, over forward and backward calls with these ``(T, N)``."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    target, found = TritonTarget(), set()
    rec = recurrence(CASES[name])

    class Recorder:
        name = "triton"

        def kernel(self, *key):  # type: ignore[no-untyped-def]
            self.key = key
            return self

        def bind(self, tensors: Sequence[torch.Tensor], placement: Placement, steps: int):  # type: ignore[no-untyped-def]
            def record(tensors: Sequence[torch.Tensor]) -> None:
                call = target.kernel(*self.key).prepared(tensors, placement, steps)(tensors)
                binder = create_function_from_signature(call.function.signature, call.function.params, backend)
                _, specialization, options = binder(*call.values, **call.constants, **call.options)
                found.add(f"{call.function.__name__} {specialization} {options}")

            return record

    for steps, n in sizes:
        given = operands(rec, (n,), steps, "contiguous")
        results = launch.run_forward(rec, Recorder(), given, steps)  # type: ignore[arg-type]
        differentiable = [y.differentiable for y in rec.ys] + [c.differentiable for c in rec.finals]
        cotangents = [r for r, d in zip(results, differentiable, strict=True) if d]
        launch.run_backward(rec, Recorder(), given, cotangents, steps)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("name", ["lif", "synaptic"])
def test_new_sizes_compile_no_new_kernel(name):
    aligned = [(1, 16), (2, 16), (16, 64), (17, 4096), (64, 48), (7, 1024)]
    odd = [(1, 1), (2, 1), (16, 3), (17, 63), (64, 1000)]
    large = [(1, 1 << 17), (2, (1 << 17) + 16)]
    assert len(variants(name, aligned)) == 2  # one forward, one backward
    assert len(variants(name, odd)) == 2
    assert len(variants(name, aligned + odd + large)) == 6
