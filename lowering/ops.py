"""The table of pointwise ops: one row an op - its ATen overloads, its type promotion, its C++, its Triton.

An expression sees its operands already converted to the *computation dtype* (``float`` for fp32, bf16 and fp16, as
eager computes) and is rounded to the result dtype afterwards, once. Forward kernels are bit-exact with eager, so an
expression must be the same operation, not merely the same function.

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

from snn_compile.lowering.cpp import expressions as cpu
from snn_compile.lowering.triton import expressions as gpu
from snn_compile.passes.representable import WHOLE, is_representable

aten = torch.ops.aten

#: A format string over the operands, or a function of ``(operands, node)`` where constants decide the form.
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
    #: eager on CPU computes bf16 and fp16 with a number in fp32; other ops round the number to bf16 or fp16 first
    keeps_numbers: bool = False
    #: how far the C++ may be from eager on CPU, in units in the last place (measured: `tests/lowering/test_ops.py`)
    cpp_ulps: float = 0


COMPARE, FLOAT, BOOL = Kind.ALWAYS_BOOL, Kind.INT_TO_FLOAT, Kind.ALWAYS_BOOL


def _unary(name: str, cpp: Expression, triton: Expression, **kw: object) -> PointwiseOp:
    kw.setdefault("promotion", FLOAT)
    return PointwiseOp((f"{name}.default",), cpp, triton, **kw)  # type: ignore[arg-type]


def _transcendental(name: str, cpp_ulps: float = 1) -> PointwiseOp:
    helper = f"v{name}"
    return _unary(name, f"{helper}({{0}})", f"libdevice.{name}({{0}})", cpp_helpers=(helper,), exact=False, cpp_ulps=cpp_ulps)


def _shifts(side: str) -> tuple[str, ...]:
    dunder = f"__{side[0]}shift__"
    return (f"bitwise_{side}_shift.Tensor", f"bitwise_{side}_shift.Tensor_Scalar", f"{dunder}.Tensor", f"{dunder}.Scalar")


ROWS: tuple[PointwiseOp, ...] = (
    # ------------------------------------------------------------------------------------------------- arithmetic
    PointwiseOp(("add.Tensor", "add.Scalar"), cpu.add, gpu.add),
    PointwiseOp(("sub.Tensor", "sub.Scalar"), cpu.sub, gpu.sub),
    PointwiseOp(("rsub.Scalar", "rsub.Tensor"), cpu.rsub, gpu.rsub),
    PointwiseOp(("mul.Tensor", "mul.Scalar"), cpu.mul, gpu.mul, keeps_numbers=True),
    PointwiseOp(("div.Tensor", "div.Scalar"), "{0} / {1}", gpu.div, FLOAT, keeps_numbers=True),
    PointwiseOp(("addcmul.default",), cpu.addcmul, gpu.addcmul, keeps_numbers=True),
    PointwiseOp(("neg.default",), "-{0}", gpu.neg),
    PointwiseOp(("abs.default",), cpu.absolute, gpu.absolute),
    PointwiseOp(("sign.default", "sgn.default"), "({0} > 0) - ({0} < 0)", gpu.sign),
    PointwiseOp(("relu.default",), "{0} < 0 ? 0 : {0}", gpu.relu),
    PointwiseOp(("maximum.default",), cpu.maximum, gpu.maximum),
    PointwiseOp(("minimum.default",), cpu.minimum, gpu.minimum),
    PointwiseOp(
        ("clamp.default", "clamp.Tensor", "hardtanh.default", "clamp_min.default", "clamp_min.Tensor"),
        cpu.clamp,
        gpu.clamp,
    ),
    PointwiseOp(("clamp_max.default", "clamp_max.Tensor"), cpu.clamp_max, gpu.minimum),
    PointwiseOp(("fmod.Tensor", "fmod.Scalar"), cpu.fmod, gpu.fmod, cpp_helpers=("vfmod",)),
    PointwiseOp(("copysign.Tensor", "copysign.Scalar"), cpu.copysign, "libdevice.copysign({0}, {1})", FLOAT),
    PointwiseOp(("floor.default",), cpu.rounding("floor"), gpu.rounding("tl.floor")),
    PointwiseOp(("ceil.default",), cpu.rounding("ceil"), gpu.rounding("tl.ceil")),
    PointwiseOp(("trunc.default",), cpu.rounding("trunc"), gpu.rounding("libdevice.trunc")),
    PointwiseOp(("round.default",), cpu.rounding("nearbyint"), gpu.rounding("libdevice.rint")),
    # ------------------------------------------------------------------------------------------------- comparison
    *(
        PointwiseOp((f"{name}.Tensor", f"{name}.Scalar"), f"{{0}} {op} {{1}}", f"{{0}} {op} {{1}}", COMPARE)
        for name, op in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"), ("eq", "=="), ("ne", "!="))
    ),
    PointwiseOp(("isnan.default",), "{0} != {0}", "{0} != {0}", COMPARE),
    PointwiseOp(("logical_not.default",), "!{0}", gpu.logical_not, BOOL),
    PointwiseOp(("logical_and.default",), "({0} != 0) & ({1} != 0)", gpu.logical("&"), BOOL),
    PointwiseOp(("logical_or.default",), "({0} != 0) | ({1} != 0)", gpu.logical("|"), BOOL),
    PointwiseOp(("logical_xor.default",), "({0} != 0) ^ ({1} != 0)", gpu.logical("^"), BOOL),
    PointwiseOp(("bitwise_not.default",), cpu.bitwise_not, gpu.bitwise_not),
    PointwiseOp(("bitwise_and.Tensor", "bitwise_and.Scalar"), "{0} & {1}", "{0} & {1}"),
    PointwiseOp(("bitwise_or.Tensor", "bitwise_or.Scalar"), "{0} | {1}", "{0} | {1}"),
    PointwiseOp(("bitwise_xor.Tensor", "bitwise_xor.Scalar"), "{0} ^ {1}", "{0} ^ {1}"),
    PointwiseOp(_shifts("left"), cpu.shift("<<"), gpu.shift("<<")),
    PointwiseOp(_shifts("right"), cpu.shift(">>"), gpu.shift(">>")),
    PointwiseOp(
        ("where.self", "where.ScalarOther", "where.ScalarSelf"),
        cpu.where,
        "tl.where({0}, {1}, {2})",
        None,
        cpp_helpers=("choose",),
    ),
    PointwiseOp(("signbit.default",), cpu.signbit, gpu.signbit, COMPARE),
    PointwiseOp(("heaviside.default",), cpu.heaviside, gpu.heaviside),
    # --------------------------------------------------------------------------------------------- transcendental
    # eager's sqrt is MKL's, which is off by one unit now and then; the kernel's is correctly rounded
    _unary("sqrt", cpu.sqrt, gpu.sqrt, cpp_ulps=1),
    _unary("rsqrt", cpu.rsqrt, "libdevice.rsqrt({0})", exact=False, cpp_ulps=1),
    _unary("reciprocal", "1 / {0}", gpu.reciprocal),
    _unary("sigmoid", "sigmoid({0})", gpu.sigmoid, cpp_helpers=("sigmoid",)),
    *map(_transcendental, ("exp", "expm1", "exp2", "log", "log1p", "log2", "sin", "cos", "tan", "asin", "acos", "atan")),
    *map(_transcendental, ("sinh", "cosh", "tanh", "atanh", "erf", "erfc")),
    _transcendental("log10", cpp_ulps=2),
    PointwiseOp(("atan2.default",), "vatan2({0}, {1})", "libdevice.atan2({0}, {1})", FLOAT, ("vatan2",), exact=False, cpp_ulps=1),
    PointwiseOp(
        ("hypot.default",), "vhypot({0}, {1})", "libdevice.hypot({0}, {1})", cpp_helpers=("vhypot",), exact=False, cpp_ulps=1
    ),
    PointwiseOp(
        ("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar"),
        cpu.power,
        gpu.power,
        cpp_helpers=("vpow", "integer_power"),
        exact=False,
        cpp_ulps=32,  # the last lanes of eager's loop have the exponent in fp64
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
    if "shift" in name and node.meta["val"].dtype.is_floating_point:  # a product with a power of two; deprecated
        return False
    if name.startswith("fmod") and not node.meta["val"].dtype.is_floating_point:  # eager raises where an integer divides by 0
        divisor = node.args[1]
        return isinstance(divisor, int) and divisor > 0
    return all(d in DTYPES for d in [*dtypes, node.meta["val"].dtype]) and _has_bounds_in_range(node)


def _has_bounds_in_range(node: fx.Node) -> bool:
    """Bounds of `clamp` that its integers cannot hold: PyTorch wraps (to 2.13), ignores or refuses them."""
    dtype = node.meta["val"].dtype
    if not overload_name(node.target).startswith("clamp") or dtype.is_floating_point or dtype == torch.bool:
        return True
    numbers = [o for o in operand_nodes(node) if not isinstance(o, fx.Node)]
    return all(torch.iinfo(dtype).min <= n <= torch.iinfo(dtype).max for n in numbers)  # type: ignore[operator]


def operand_nodes(node: fx.Node) -> list[object]:
    """The operands of a row in schema order: nodes and Python numbers, keyword operands (`min`, `max`) included."""
    name = overload_name(node.target)
    schema = node.target._schema  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    skip = {"alpha", "value", "dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format"}
    if name in ("hardtanh.default",):
        given = {"self": given["self"], "min": given.get("min_val", -1.0), "max": given.get("max_val", 1.0)}
    operands = [v for k, v in given.items() if k not in skip and v is not None]
    return operands


#: Ops whose result is one of the operands, its negative, or a whole number.
_EXACT = {"neg", "abs", "sign", "sgn", "relu", "maximum", "minimum", "where", "heaviside", "floor", "ceil", "trunc", "round"}


def is_exact(node: fx.Node) -> bool:
    """Whether the result needs no rounding to bf16 or fp16, its operands having been rounded."""
    op, dtype = overload_name(node.target).split(".")[0], node.meta["val"].dtype
    if op == "_to_copy":
        return node.args[0].meta["val"].dtype == torch.bool  # type: ignore[union-attr]
    return (op in _EXACT and promoted_dtype(node) == dtype) or (dtype in WHOLE and is_representable(node))


def computation_dtype(node: fx.Node) -> torch.dtype:
    """The dtype in which eager evaluates the op: fp32 for bf16 and fp16, the promoted dtype otherwise."""
    return opmath(promoted_dtype(node))


def promoted_dtype(node: fx.Node) -> torch.dtype:
    """The common dtype of the operands."""
    row = TABLE[overload_name(node.target)]
    if row.promotion is None:
        return node.meta["val"].dtype
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in operand_nodes(node)]
    kind = Kind.DEFAULT if row.promotion == Kind.ALWAYS_BOOL else row.promotion
    return elementwise_dtypes(*values, type_promotion_kind=kind)[1]


def opmath(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def is_finite(value: float | int | bool) -> bool:
    return math.isfinite(value)
