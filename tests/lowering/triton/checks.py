"""Run a kernel and compare it with eager: the same in Triton's interpreter and on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snn_compile.lowering.launch import run_backward, run_forward
from snn_compile.lowering.triton.target import TritonTarget
from tests.lowering.triton.cases import CASES, autograd, operands, recurrence, walk_back

TARGET = TritonTarget()

#: Relative to the largest gradient: a few roundings of the sigmoid's exponential.
CLOSE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
#: Autograd accumulates in the operand's dtype, and sums broadcast gradients step by step.
AUTOGRAD = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-1, torch.float16: 3e-2}


def check(
    name: str,
    dtype: torch.dtype = torch.float32,
    steps: int = 9,
    shape: Sequence[int] = (3, 5),
    layout: str = "contiguous",
    time_dim: int = 0,
    reverse: bool = False,
    device: str = "cpu",
) -> None:
    """Forward bit for bit against `Recurrence.__call__`, gradients against its backward graph and against autograd."""
    torch.use_deterministic_algorithms(True)  # fills what `torch.empty` gives with NaN: nothing may be left unwritten
    case = CASES[name]
    rec = recurrence(case, dtype, time_dim=time_dim, reverse=reverse)
    given = operands(rec, shape, steps, layout, device)
    results = run_forward(rec, TARGET, given, steps)
    for result, expected in zip(results, rec(*given, steps=steps), strict=True):
        assert result.shape == expected.shape and result.dtype == expected.dtype
        assert torch.equal(result, expected), f"{(result != expected).sum()} of {expected.numel()} values differ"
    if steps:
        assert any(r.any() for r in results), "nothing fired: the comparison says nothing"

    differentiable = [y.differentiable for y in rec.ys] + [c.differentiable for c in rec.finals]
    cotangents = [torch.randn_like(r) for r, d in zip(results, differentiable, strict=True) if d]
    gradients = run_backward(rec, TARGET, given, cotangents, steps)
    expected = walk_back(rec, [g.cpu() for g in given], [c.cpu() for c in cotangents], steps)
    _compare(gradients, [e.to(device) for e in expected], CLOSE[dtype])
    if not steps:
        return
    needed = [c.init_needs_grad for c in rec.carries] + [s.needs_grad for s in (*rec.xs, *rec.consts)]
    wanted = [(g, i) for i, (g, n) in enumerate(zip(given, needed, strict=True)) if n]
    timed = range(len(rec.carries), len(rec.carries) + len(rec.xs))
    summed = [sum_to(gradient, operand.shape, i in timed) for gradient, (operand, i) in zip(gradients, wanted, strict=True)]
    _compare(summed, autograd(rec, case, given, cotangents, steps), AUTOGRAD[dtype])


def sum_to(gradient: Tensor, shape: torch.Size, timed: bool) -> Tensor:
    """The gradient of a broadcast operand; `timed` keeps dim 0."""
    if timed:
        shape = torch.Size([shape[0], *[1] * (gradient.dim() - len(shape)), *shape[1:]])
        dims = [d for d in range(1, gradient.dim()) if shape[d] == 1 and gradient.shape[d] != 1]
        return gradient.sum(dims, keepdim=True) if dims else gradient
    return gradient.sum_to_size(shape)


def _compare(results: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for result, reference in zip(results, expected, strict=True):
        if reference.numel() == 0:
            continue
        reference, result = reference.double(), result.double().reshape(reference.shape)
        scale = reference.abs().max().clamp(min=1e-30)
        error = ((result - reference).abs().max() / scale).item()
        assert error <= tolerance, f"gradient off by {error:.1e} of its largest value"
