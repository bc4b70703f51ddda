"""A value of the generated code: its text, dtype and precedence; conversions between dtypes as eager converts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from snn_compile.lowering.ops import opmath
from snn_compile.lowering.triton.literals import TRITON_DTYPES, Number, literal

#: Rounding helpers of the generated modules, for the dtypes that live in fp32.
ROUNDING = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Value:
    """What a node is in the generated code."""

    text: str
    #: as eager has it; in registers it is `opmath(dtype)`
    dtype: torch.dtype
    #: one element a lane (else one for all)
    block: bool = True
    #: a Python number
    number: Number | None = None
    #: names of variables in the text
    uses: frozenset[str] = frozenset()

    @staticmethod
    def variable(name: str, dtype: torch.dtype, *, block: bool = True) -> Value:
        return Value(name, dtype, block, uses=frozenset({name}))


def number(value: Number, dtype: torch.dtype, *, arithmetic: bool = False) -> Value:
    """A literal: rounded to `dtype`, spelled in the dtype of registers."""
    if dtype in ROUNDING:
        value = torch.tensor(value, dtype=torch.float64).to(dtype).item()
    text = literal(value, opmath(dtype), arithmetic=arithmetic)
    return Value(text, dtype, block=False, number=value)


def convert(value: Value, dtype: torch.dtype) -> Value:
    """The value in `dtype`, as eager converts: once through every dtype that eager goes through."""
    if value.dtype == dtype or (value.dtype in ROUNDING and dtype == opmath(value.dtype)):
        return replace(value, dtype=dtype)
    if value.number is not None:
        return number(value.number, dtype)
    source, target = opmath(value.dtype), opmath(dtype)
    text = value.text
    if source != target:
        text = text if precedence(text) == _ATOM else f"({text})"
        if source.is_floating_point and target == torch.uint8:
            text += ".to(tl.int64)"  # c10::static_cast_with_inter_type
        text = f"{text}.to({TRITON_DTYPES[target]})"
    if dtype in ROUNDING and value.dtype != torch.bool:
        text = f"{ROUNDING[dtype]}({text})"
    return replace(value, text=text, dtype=dtype)


def fill(template: str, operands: Sequence[Value]) -> str:
    """`template` with the operands in place, in parentheses where they need some."""
    outer = precedence(template)

    def field(match: re.Match[str]) -> str:
        text, inner = operands[int(match[1])].text, precedence(operands[int(match[1])].text)
        before, after = template[: match.start()], template[match.end() :]
        delimited = (not before or before.endswith(("(", ", "))) and (not after or after.startswith((")", ",")))
        if delimited or inner == _ATOM:
            return text
        leftmost = not before and inner == outer and inner >= _SUM
        return text if precedence(before + "x" + after) == outer < inner or leftmost else f"({text})"

    return re.sub(r"\{(\d+)\}", field, template)


_COMPARISON, _BITS, _SUM, _PRODUCT, _SIGN, _ATOM = range(6)
_BINARY = {"*": _PRODUCT, "/": _PRODUCT, "//": _PRODUCT, "%": _PRODUCT, "+": _SUM, "-": _SUM} | dict.fromkeys("&|^", _BITS)


def precedence(text: str) -> int:
    """Of the operator that binds least among those outside of all parentheses."""
    flat = text
    while flat != (flat := re.sub(r"\([^()]*\)|\[[^\[\]]*\]", "", flat)):
        pass
    operators = re.findall(r" (\S+) ", flat)
    sign = _SIGN if flat.startswith(("-", "~")) else _ATOM
    return min([_BINARY.get(o, _COMPARISON) for o in operators], default=sign)
