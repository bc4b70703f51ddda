"""Python numbers as text that Triton reads as exactly that number in exactly that dtype.

Triton gives a literal the dtype of the tensor it meets in arithmetic (`x * 0.1`), but fp32 or int32 where it is the
argument of a function (`tl.where(s, 0.1, x)`): a literal that this would change is spelled with its dtype. It also
reads ``-0.0`` as ``0.0``.
"""

from __future__ import annotations

import math

import numpy as np
import torch

#: The dtype of a value in registers, as Triton spells it. bf16 and fp16 values live in fp32, as eager computes.
TRITON_DTYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.bool: "tl.int1",
    torch.uint8: "tl.uint8",
    torch.int8: "tl.int8",
    torch.int16: "tl.int16",
    torch.int32: "tl.int32",
    torch.int64: "tl.int64",
}

Number = int | float | bool


def round_to(value: Number, dtype: torch.dtype) -> Number:
    """The value as eager has it after a conversion to `dtype`; integers wrap."""
    if dtype.is_floating_point:
        return torch.tensor(value, dtype=torch.float64).to(dtype).item()
    return torch.tensor(value).to(torch.int64).to(dtype).item()


def literal(value: Number, dtype: torch.dtype, *, arithmetic: bool = False) -> str:
    """`value` in `dtype`; `arithmetic`: it becomes an operand of a Python operator, beside a tensor of `dtype`."""
    value = round_to(value, dtype)
    if dtype == torch.bool:
        return str(bool(value))
    if not dtype.is_floating_point:
        plain = arithmetic or (dtype == torch.int32)
        return str(value) if plain else f"tl.full((), {value}, {TRITON_DTYPES[dtype]})"
    if math.isnan(value) or math.isinf(value):
        return f'float("{value}")'
    if value == 0 and math.copysign(1.0, value) < 0:
        return f"(tl.full((), 0.0, {TRITON_DTYPES[dtype]}) * -1.0)"
    if dtype == torch.float64:
        if arithmetic or float(np.float32(value)) == value:
            return repr(value)
        return f"tl.full((), {value!r}, tl.float64)"
    short = str(np.float32(value))  # the shortest text that rounds to this number
    limits = np.finfo(np.float32)
    if value == 0 or float(limits.tiny) <= abs(float(short)) <= float(limits.max):
        return short
    return f"tl.full((), {value!r}, {TRITON_DTYPES[dtype]})"
