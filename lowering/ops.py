"""The table of pointwise ops: one row an op - its ATen overloads, its type promotion, its C++, its Triton.

An expression sees its operands already converted to the *computation dtype* (``float`` for fp32, bf16 and fp16, as eager
computes) and is rounded to the result dtype afterwards, once. Forward kernels are bit-exact with eager, so an expression
must be the same operation, not merely the same function.

To add an op, add a row; `tests/lowering/test_ops.py` compares every row with eager on every target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Kind
from torch._prims_common import elementwise_dtypes

aten = torch.ops.aten

#: An expression: a format string over the operands, or a function of ``(operands, node)`` where constants decide the form.
Expression = str | Callable[[list[str], fx.Node], str]


@dataclass(frozen=True)
class PointwiseOp:
    """A row. ``{0}``, ``{1}``… are the tensor-or-scalar operands in the order of the ATen schema."""

    overloads: tuple[str, ...]
    cpp: Expression
    triton: Expression
    #: type promotion of the operands; None: the operands listed by `operand_dtypes` keep their own
    promotion: Kind | None = Kind.DEFAULT
    #: helper functions of lowering/cpp/prelude.py that the C++ calls
    cpp_helpers: tuple[str, ...] = ()
    #: equals eager bit for bit (False: a transcendental whose last bits depend on the library eager was built with)
    exact: bool = True


def _alpha(node: fx.Node) -> float | int:
    return node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)  # type: ignore[return-value]


def _plus(sign: str, target: str) -> Expression:
    def expression(operands: list[str], node: fx.Node) -> str:
        a, b = operands[:2]
        alpha = _alpha(node)
        if alpha == 1:
            return f"{a} {sign} {b}"
        scaled = alpha if sign == "+" else -alpha
        if not node.meta["val"].dtype.is_floating_point:
            return f"{a} + {scaled} * {b}"
        # eager's vectorised loop is a fused multiply-add
        if target == "cpp":
            return f"std::fma({b}, decltype({b})({scaled!r}), {a})"
        return f"tl.fma({b}, tl.full({b}.shape, {scaled!r}, {b}.dtype), {a})"

    return expression


def _rsub(target: str) -> Expression:
    def expression(operands: list[str], node: fx.Node) -> str:
        if _alpha(node) != 1:
            return f"{operands[1]} - {_alpha(node)!r} * {operands[0]}"
        return f"{operands[1]} - {operands[0]}"

    return expression


def _power(general: str, sqrt: str) -> Expression:
    """Eager's special exponents, in eager's order of multiplication."""

    def expression(operands: list[str], node: fx.Node) -> str:
        base, exponent = operands[0], node.args[1]
        if not isinstance(exponent, fx.Node):
            root = sqrt.format(base)
            special = {
                1: base,
                2: f"{base} * {base}",
                3: f"{base} * {base} * {base}",
                0.5: root,
                -0.5: f"1 / {root}",
                -1: f"1 / {base}",
                -2: f"1 / ({base} * {base})",
            }
            if exponent in special and node.meta["val"].dtype.is_floating_point:
                return special[exponent]  # type: ignore[index]
        return general.format(base, operands[1])

    return expression


def _clamp(nothing: str, below: str, above: str) -> Expression:
    """``lo`` wins over nothing, ``hi`` over ``lo``; a NaN fails both comparisons and so stays."""

    def expression(operands: list[str], node: fx.Node) -> str:
        given = [node.kwargs.get("min"), node.kwargs.get("max")]
        for i, bound in enumerate(node.args[1:3]):
            given[i] = bound
        value, rest = operands[0], iter(operands[1:])
        if given[0] is not None:
            value = below.format(value, next(rest))
        if given[1] is not None:
            value = above.format(f"({value})" if given[0] is not None else value, next(rest))
        return value if any(b is not None for b in given) else nothing.format(value)

    return expression


COMPARE, FLOAT, BOOL = Kind.ALWAYS_BOOL, Kind.INT_TO_FLOAT, Kind.ALWAYS_BOOL


def _unary(name: str, cpp: str, triton: str, **kw: object) -> PointwiseOp:
    kw.setdefault("promotion", FLOAT)
    return PointwiseOp((f"{name}.default",), cpp, triton, **kw)  # type: ignore[arg-type]


ROWS: tuple[PointwiseOp, ...] = (
    # ------------------------------------------------------------------------------------------------- arithmetic
    PointwiseOp(("add.Tensor", "add.Scalar"), _plus("+", "cpp"), _plus("+", "triton")),
    PointwiseOp(("sub.Tensor", "sub.Scalar"), _plus("-", "cpp"), _plus("-", "triton")),
    PointwiseOp(("rsub.Scalar", "rsub.Tensor"), _rsub("cpp"), _rsub("triton")),
    PointwiseOp(("mul.Tensor", "mul.Scalar"), "{0} * {1}", "{0} * {1}"),
    PointwiseOp(("div.Tensor", "div.Scalar"), "{0} / {1}", "tl.div_rn({0}, {1})", FLOAT),
    PointwiseOp(("neg.default",), "-{0}", "-{0}"),
    PointwiseOp(("abs.default",), "std::abs({0})", "tl.abs({0})"),
    PointwiseOp(("sign.default", "sgn.default"), "({0} > 0) - ({0} < 0)", "({0} > 0) - ({0} < 0)"),
    PointwiseOp(("relu.default",), "{0} < 0 ? 0 : {0}", "tl.where({0} < 0, 0, {0})"),
    PointwiseOp(
        ("maximum.default",), "({0} != {0} || {0} > {1}) ? {0} : {1}", "tl.where(({0} != {0}) | ({0} > {1}), {0}, {1})"
    ),
    PointwiseOp(
        ("minimum.default",), "({0} != {0} || {0} < {1}) ? {0} : {1}", "tl.where(({0} != {0}) | ({0} < {1}), {0}, {1})"
    ),
    PointwiseOp(
        ("clamp.default", "clamp.Tensor", "hardtanh.default", "clamp_min.default", "clamp_min.Tensor"),
        _clamp("{0}", "{0} < {1} ? {1} : {0}", "{0} > {1} ? {1} : {0}"),
        _clamp("{0}", "tl.where({0} < {1}, {1}, {0})", "tl.where({0} > {1}, {1}, {0})"),
    ),
    PointwiseOp(
        ("clamp_max.default", "clamp_max.Tensor"), "{0} > {1} ? {1} : {0}", "tl.where({0} > {1}, {1}, {0})"
    ),
    PointwiseOp(("floor.default",), "std::floor({0})", "tl.floor({0})"),
    PointwiseOp(("ceil.default",), "std::ceil({0})", "tl.ceil({0})"),
    PointwiseOp(("trunc.default",), "std::trunc({0})", "libdevice.trunc({0})"),
    PointwiseOp(("round.default",), "std::nearbyint({0})", "libdevice.rint({0})"),
    # ------------------------------------------------------------------------------------------------- comparison
    *(
        PointwiseOp((f"{name}.Tensor", f"{name}.Scalar"), f"{{0}} {op} {{1}}", f"{{0}} {op} {{1}}", COMPARE)
        for name, op in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"), ("eq", "=="), ("ne", "!="))
    ),
    PointwiseOp(("isnan.default",), "{0} != {0}", "{0} != {0}", COMPARE),
    PointwiseOp(("logical_not.default",), "!{0}", "{0} == 0", BOOL),
    PointwiseOp(("logical_and.default",), "({0} != 0) & ({1} != 0)", "({0} != 0) & ({1} != 0)", BOOL),
    PointwiseOp(("logical_or.default",), "({0} != 0) | ({1} != 0)", "({0} != 0) | ({1} != 0)", BOOL),
    PointwiseOp(("logical_xor.default",), "({0} != 0) ^ ({1} != 0)", "({0} != 0) ^ ({1} != 0)", BOOL),
    PointwiseOp(
        ("bitwise_not.default",),
        lambda a, n: f"!{a[0]}" if n.meta["val"].dtype == torch.bool else f"~{a[0]}",
        lambda a, n: f"{a[0]} == 0" if n.meta["val"].dtype == torch.bool else f"~{a[0]}",
    ),
    PointwiseOp(("bitwise_and.Tensor", "bitwise_and.Scalar"), "{0} & {1}", "{0} & {1}"),
    PointwiseOp(("bitwise_or.Tensor", "bitwise_or.Scalar"), "{0} | {1}", "{0} | {1}"),
    PointwiseOp(("bitwise_xor.Tensor", "bitwise_xor.Scalar"), "{0} ^ {1}", "{0} ^ {1}"),
    PointwiseOp(
        ("where.self", "where.ScalarOther", "where.ScalarSelf"), "{0} ? {1} : {2}", "tl.where({0}, {1}, {2})", None
    ),
    PointwiseOp(("heaviside.default",), "{0} == 0 ? {1} : ({0} > 0)", "tl.where({0} == 0, {1}, {0} > 0)"),
    # --------------------------------------------------------------------------------------------- transcendental
    _unary("sqrt", "std::sqrt({0})", "tl.sqrt_rn({0})"),
    _unary("rsqrt", "1 / std::sqrt({0})", "tl.div_rn(1.0, tl.sqrt_rn({0}))", exact=False),
    _unary("reciprocal", "1 / {0}", "tl.div_rn(1.0, {0})"),
    _unary("sigmoid", "sigmoid({0})", "tl.div_rn(1.0, 1.0 + libdevice.exp(-{0}))", cpp_helpers=("sigmoid",)),
    _unary("exp", "vexp({0})", "libdevice.exp({0})", cpp_helpers=("vexp",), exact=False),
    _unary("expm1", "std::expm1({0})", "libdevice.expm1({0})", exact=False),
    _unary("log", "vlog({0})", "libdevice.log({0})", cpp_helpers=("vlog",), exact=False),
    _unary("log1p", "std::log1p({0})", "libdevice.log1p({0})", exact=False),
    _unary("tanh", "vtanh({0})", "libdevice.tanh({0})", cpp_helpers=("vtanh",), exact=False),
    _unary("sin", "vsin({0})", "libdevice.sin({0})", cpp_helpers=("vsin",), exact=False),
    _unary("cos", "vcos({0})", "libdevice.cos({0})", cpp_helpers=("vcos",), exact=False),
    _unary("atan", "std::atan({0})", "libdevice.atan({0})", exact=False),
    _unary("erf", "verf({0})", "libdevice.erf({0})", cpp_helpers=("verf",), exact=False),
    _unary("erfc", "std::erfc({0})", "libdevice.erfc({0})", exact=False),
    PointwiseOp(
        ("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar"),
        _power("std::pow({0}, {1})", "std::sqrt({0})"),
        _power("libdevice.pow({0}, {1})", "tl.sqrt_rn({0})"),
        exact=False,
    ),
    # -------------------------------------------------------------------------------------- conversion, constants
    PointwiseOp(("_to_copy.default",), "{0}", "{0}", None),
)

#: Ops whose result is one Python number, in the result's dtype: ``full_like(x, 0.5)``.
CONSTANTS: dict[str, Callable[[fx.Node], object]] = {
    "full_like.default": lambda n: n.args[1],
    "zeros_like.default": lambda n: 0,
    "ones_like.default": lambda n: 1,
    "full.default": lambda n: n.args[1],
    "zeros.default": lambda n: 0,
    "ones.default": lambda n: 1,
    "scalar_tensor.default": lambda n: n.args[0],
    "new_zeros.default": lambda n: 0,
    "new_ones.default": lambda n: 1,
    "new_full.default": lambda n: n.args[2],
}

TABLE: dict[str, PointwiseOp] = {overload: row for row in ROWS for overload in row.overloads}

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)


def overload_name(target: object) -> str:
    """``aten.add.Tensor`` -> ``"add.Tensor"``; the empty string for anything that is not an ATen overload."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return f"{target._schema.name.split('::')[1]}.{target._overloadname}"
    return ""


def is_supported(node: fx.Node) -> bool:
    """Whether every target can lower this node of a step graph."""
    name = overload_name(node.target)
    if name in CONSTANTS:
        value = CONSTANTS[name](node)
        return isinstance(value, (int, float, bool)) and node.meta["val"].dtype in DTYPES
    if name not in TABLE:
        return False
    dtypes = [a.meta["val"].dtype for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    return all(d in DTYPES for d in [*dtypes, node.meta["val"].dtype])


def operand_nodes(node: fx.Node) -> list[object]:
    """The operands of a row in schema order: nodes and Python numbers, keyword operands (`min`, `max`) included."""
    name = overload_name(node.target)
    schema = node.target._schema  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    skip = {"alpha", "dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format"}
    if name in ("hardtanh.default",):
        given = {"self": given["self"], "min": given.get("min_val", -1.0), "max": given.get("max_val", 1.0)}
    operands = [v for k, v in given.items() if k not in skip and v is not None]
    return operands


def computation_dtype(node: fx.Node) -> torch.dtype:
    """The dtype in which eager evaluates the op: fp32 for bf16 and fp16, the promoted dtype otherwise."""
    row = TABLE[overload_name(node.target)]
    result = node.meta["val"].dtype
    if row.promotion is None:
        return opmath(result)
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in operand_nodes(node)]
    compute, _ = elementwise_dtypes(*values, type_promotion_kind=row.promotion)
    return opmath(compute)


def opmath(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def is_finite(value: float | int | bool) -> bool:
    return math.isfinite(value)
