"""Triton's interpreter in a process of its own, because Triton must be imported with TRITON_INTERPRET=1.

The interpreter is completed where it does not compute what a device computes: bf16 conversions truncate, `libdevice` is
empty, `tl.fma` rounds twice.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


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
        return cast(self, source, target)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        wide = np.longdouble if z.data.dtype == np.float64 else np.float64  # the product is exact in fp64 for fp32
        value = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
        return TensorHandle(value.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.cast_impl = cast_to_nearest
    InterpreterBuilder.create_fma = fma
    np.seterr(all="ignore")
    names = ("exp", "expm1", "log", "log1p", "tanh", "sin", "cos", "atan", "erf", "erfc", "rsqrt", "trunc", "pow")
    for name, function in [(n, getattr(torch, n)) for n in names] + [("rint", torch.round)]:
        setattr(libdevice, name, _elementwise(function))


def _elementwise(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def call(*operands: Any) -> Any:
        first = next(o for o in operands if isinstance(o, tl.tensor))
        arrays = [torch.from_numpy(o.handle.data) if isinstance(o, tl.tensor) else o for o in operands]
        result = function(*arrays).numpy()
        return tl.tensor(TensorHandle(result, first.dtype.scalar), first.type)

    return call
