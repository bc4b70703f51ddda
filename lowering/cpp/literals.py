"""How dtypes and numbers are written in C++."""

from __future__ import annotations

import math
import struct

import torch

#: The C++ type in which a value of the dtype is held and computed: bf16 and fp16 as float, rounded after each op.
HELD: dict[torch.dtype, str] = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "float",
    torch.float16: "float",
    torch.bool: "bool",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
}

#: The two dtypes whose bits in memory are not those of the held type, by the name their helpers use.
HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def stored(dtype: torch.dtype) -> str:
    """The C++ type of an element in memory."""
    return "uint16_t" if dtype in HALVES else HELD[dtype]


def held_bytes(dtype: torch.dtype) -> int:
    return 4 if dtype in HALVES else dtype.itemsize


def literal(value: float | int | bool, dtype: torch.dtype) -> str:
    """`value` converted to `dtype`, exactly."""
    kind = HELD[dtype]
    if kind == "bool":
        return "true" if value else "false"
    if kind in ("float", "double"):
        rounded = torch.tensor(float(value), dtype=torch.float64).to(dtype).item()
        return _float_literal(rounded, single=kind == "float")
    info = torch.iinfo(dtype)
    number = (int(value) - info.min) % 2**info.bits + info.min
    if abs(number) < 2**31:
        return str(number)
    return f"({number + 1}LL - 1)" if number == -(2**63) else f"{number}LL"


def _float_literal(value: float, single: bool) -> str:
    suffix = "f" if single else ""
    if math.isnan(value):
        return f'__builtin_nan{suffix}("")'
    if math.isinf(value):
        return ("-" if value < 0 else "") + f"__builtin_inf{suffix}()"
    text = _shortest(value, single)
    if not any(c in text for c in ".en"):
        text += ".0"
    return text + suffix


def _to_single(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).to(torch.float32).item()


def _shortest(value: float, single: bool) -> str:
    """The fewest digits that read back as `value`."""
    if not single:
        return repr(value)
    for digits in range(1, 10):
        text = f"{value:.{digits}g}"
        if struct.pack("f", _to_single(float(text))) == struct.pack("f", value):
            return repr(float(text))
    raise AssertionError(value)
