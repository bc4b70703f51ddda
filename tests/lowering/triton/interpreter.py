"""Triton's interpreter in a process of its own, because Triton must be imported with TRITON_INTERPRET=1.

The interpreter is completed where it does not compute what a device computes: bf16 conversions truncate, `libdevice` is
empty, `tl.fma` rounds twice, and (Triton 3.9) a comparison of scalars becomes integers where it is stretched over lanes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from snn_compile.lowering.cpp.prelude import SLEEF


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """``call(function, *args, **kwargs)`` runs a module-level function in the process; its exceptions come back."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=complete_interpreter)
    try:
        pool.submit(os.getpid).result()  # the process starts, with the variable set
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
    finally:
        pool.shutdown()


def complete_interpreter() -> None:
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    torch.set_num_threads(1)
    cast = InterpreterBuilder.cast_impl

    def cast_to_nearest(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(source.data).to(torch.bfloat16).view(torch.uint16)
            return TensorHandle(rounded.numpy(), target.scalar)
        if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
            wide = source.data.astype(np.uint32) << 16
            return TensorHandle(wide.view(np.float32), target.scalar)
        return cast(self, source, target)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return TensorHandle(_fused(x.data, y.data, z.data), z.dtype.scalar)

    splat = InterpreterBuilder.create_splat

    def splat_conditions(self: Any, shape: Any, scalar: Any) -> Any:
        handle = TensorHandle(scalar.data, tl.int1) if scalar.data.dtype == np.bool_ else scalar
        return splat(self, shape, handle)

    InterpreterBuilder.create_splat = splat_conditions
    InterpreterBuilder.cast_impl = cast_to_nearest
    InterpreterBuilder.create_fma = fma
    np.seterr(all="ignore")
    names = (*SLEEF, "rsqrt", "trunc", "copysign")
    for name, function in [(n, getattr(torch, n)) for n in names] + [("rint", torch.round)]:
        setattr(libdevice, name, _elementwise(function))


def _fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``x * y + z`` with one rounding."""
    if z.dtype == np.float64:
        exact = np.frompyfunc(lambda a, b, c: float(Fraction(a) * Fraction(b) + Fraction(c)), 3, 1)
        finite = np.isfinite(x) & np.isfinite(y) & np.isfinite(z)
        safe = [np.where(finite, v, 0.0) for v in (x, y, z)]
        return np.where(finite & (x * y + z != 0), exact(*safe).astype(np.float64), x * y + z)
    product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)  # the product is exact
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    # round to odd, so that the second rounding is the only one
    inexact = (error != 0) & np.isfinite(error) & (np.frexp(total)[0] * 2.0**52 % 1 == 0)
    total = np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return total.astype(z.dtype)


def _elementwise(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def call(*operands: Any) -> Any:
        first = next(o for o in operands if isinstance(o, tl.tensor))
        arrays = [torch.from_numpy(o.handle.data) if isinstance(o, tl.tensor) else o for o in operands]
        result = function(*arrays).numpy()
        return tl.tensor(TensorHandle(result, first.dtype.scalar), first.type)

    return call
