"""The `cpp` column of the op table where a format string does not do.

What eager *on CPU* computes decides (ATen/native/cpu): these are the operations of its vectorised loops, op by op. The
functions take the operands as text, in the computation dtype, and the node.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from snn_compile.lowering.cpp.literals import HELD, literal

Expression = Callable[[list[str], fx.Node], str]


def _dtype(node: fx.Node) -> torch.dtype:
    """The computation dtype of an op whose result has the promoted dtype of its operands."""
    dtype = node.meta["val"].dtype
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _is_float(node: fx.Node) -> bool:
    return node.meta["val"].dtype.is_floating_point


def _builtin(name: str, node: fx.Node) -> str:
    """``__builtin_floorf``: the compiler's own, which saves including <cmath> (a third of the time to compile)."""
    return f"__builtin_{name}{'f' if _dtype(node) == torch.float32 else ''}"


def _axpy(a: str, b: str, sign: int, node: fx.Node) -> str:
    """``a + sign*alpha*b``; eager's vectorised loop is a fused multiply-add."""
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    if node.meta["val"].dtype == torch.bool:
        return f"{a} | {b}"
    if alpha == 1:
        return f"{a} {'+' if sign > 0 else '-'} {b}"
    factor = literal(sign * alpha, node.meta["val"].dtype)  # type: ignore[operator, arg-type]
    return f"{_builtin('fma', node)}({b}, {factor}, {a})" if _is_float(node) else f"{a} + {factor} * {b}"


def add(operands: list[str], node: fx.Node) -> str:
    return _axpy(operands[0], operands[1], 1, node)


def sub(operands: list[str], node: fx.Node) -> str:
    return _axpy(operands[0], operands[1], -1, node)


def rsub(operands: list[str], node: fx.Node) -> str:
    return _axpy(operands[1], operands[0], -1, node)


def mul(operands: list[str], node: fx.Node) -> str:
    return f"{operands[0]} {'&' if node.meta['val'].dtype == torch.bool else '*'} {operands[1]}"


def addcmul(operands: list[str], node: fx.Node) -> str:
    """``a + value*b*c``; eager's vectorised loop rounds ``value*b``, and the rest as one fused multiply-add."""
    a, b, c = operands
    value = node.kwargs.get("value", 1)
    if value != 1:
        b = f"({literal(value, _dtype(node))} * {b})"  # type: ignore[arg-type]
    return f"{_builtin('fma', node)}({b}, {c}, {a})" if _is_float(node) else f"{a} + {b} * {c}"


def absolute(operands: list[str], node: fx.Node) -> str:
    (x,) = operands
    if _is_float(node):
        return f"{_builtin('fabs', node)}({x})"
    return x if node.meta["val"].dtype in (torch.bool, torch.uint8) else f"{x} < 0 ? -{x} : {x}"


def rounding(name: str) -> Expression:
    """floor, ceil, trunc, round: integers are what they are."""
    return lambda operands, node: f"{_builtin(name, node)}({operands[0]})" if _is_float(node) else operands[0]


def sqrt(operands: list[str], node: fx.Node) -> str:
    return f"{_builtin('sqrt', node)}({operands[0]})"


def rsqrt(operands: list[str], node: fx.Node) -> str:
    return f"1 / {_builtin('sqrt', node)}({operands[0]})"


def fmod(operands: list[str], node: fx.Node) -> str:
    return f"vfmod({operands[0]}, {operands[1]})" if _is_float(node) else f"{operands[0]} % {operands[1]}"


def copysign(operands: list[str], node: fx.Node) -> str:
    return f"{_builtin('copysign', node)}({operands[0]}, {operands[1]})"


def signbit(operands: list[str], node: fx.Node) -> str:
    """The sign of the bits: true for -0 and for a negative NaN."""
    dtype = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    if not dtype.is_floating_point:
        return f"{operands[0]} < 0"
    return f"__builtin_bit_cast({'int64_t' if dtype == torch.float64 else 'int32_t'}, {operands[0]}) < 0"


def where(operands: list[str], node: fx.Node) -> str:
    """Both sides are computed: under a branch the compiler would not vectorise the functions in them."""
    condition, yes, no = operands
    return f"choose({condition}, {yes}, {no})" if _is_float(node) else f"{condition} ? {yes} : {no}"


def _pick(relation: str, a: str, b: str) -> str:
    """`a` where it is NaN or stands in the relation to `b`, else `b` (which may be NaN too)."""
    return f"{a} != {a} || {a} {relation} {b} ? {a} : {b}"


def maximum(operands: list[str], node: fx.Node) -> str:
    return _pick(">", operands[0], operands[1])


def minimum(operands: list[str], node: fx.Node) -> str:
    return _pick("<", operands[0], operands[1])


def clamp(operands: list[str], node: fx.Node) -> str:
    """``lo`` wins over the value, ``hi`` over ``lo``; a NaN fails both comparisons and so stays, a NaN bound wins."""
    given = dict(enumerate(node.args[1:3]))
    given |= {i: node.kwargs[k] for i, k in enumerate(("min", "max")) if k in node.kwargs}
    hard = "hardtanh" in str(node.target)
    value, bounds = operands[0], iter(operands[1:])
    if given.get(0) is not None or hard:
        value = _bound("<", value, next(bounds), node)
    if given.get(1) is not None or hard:
        value = _bound(">", f"({value})" if "?" in value else value, next(bounds), node)
    return value


def clamp_max(operands: list[str], node: fx.Node) -> str:
    return _bound(">", operands[0], operands[1], node)


def _bound(relation: str, value: str, bound: str, node: fx.Node) -> str:
    if isinstance(node.args[-1], fx.Node) and len(node.args) > 1 and _is_float(node):  # a tensor may hold NaN
        return f"{value} != {value} || {value} {'>' if relation == '<' else '<'} {bound} ? {value} : {bound}"
    return f"{value} {relation} {bound} ? {bound} : {value}"


def bitwise_not(operands: list[str], node: fx.Node) -> str:
    return f"{'!' if node.meta['val'].dtype == torch.bool else '~'}{operands[0]}"


def shift(operator: str) -> Expression:
    """``a << b`` or ``a >> b`` of integers; all bits are shifted out where b is negative or no less than their number."""

    def expression(operands: list[str], node: fx.Node) -> str:
        (a, b), by, dtype = operands, node.args[1], node.meta["val"].dtype
        bits = 8 * dtype.itemsize
        nothing = "0" if operator == "<<" or dtype == torch.uint8 else f"{a} >> {bits - 1}"
        if isinstance(by, fx.Node):
            return f"{b} < 0 || {b} >= {bits} ? {nothing} : {a} {operator} {b}"
        return f"{a} {operator} {b}" if 0 <= by < bits else nothing  # type: ignore[operator]

    return expression


def heaviside(operands: list[str], node: fx.Node) -> str:
    x, at_zero = operands
    return f"{x} == 0 ? {at_zero} : {HELD[_dtype(node)]}({x} > 0)"


def power(operands: list[str], node: fx.Node) -> str:
    """Eager's special exponents, in its order of multiplication (pow_tensor_scalar_optimized_kernel)."""
    base, exponent = operands[0], node.args[1]
    if not isinstance(exponent, fx.Node) and _is_float(node):
        root, result = sqrt([base], node), node.meta["val"].dtype
        square = f"{base} * {base}"
        if result == torch.bfloat16:  # each of eager's multiplications rounds
            square = f"round_bf16({square})"
        special = {
            1: base,
            2: f"{base} * {base}",
            3: f"{square} * {base}",
            0.5: root,
            -0.5: f"1 / {root}",
            -1: f"1 / {base}",
            -2: f"1 / ({square})",
        }
        if exponent in special and not (result == torch.float16 and exponent in (0.5, -0.5)):
            return special[exponent]  # type: ignore[index]
    if _is_float(node):
        return f"vpow({base}, {operands[1]})"
    return f"integer_power({base}, {operands[1]})"
