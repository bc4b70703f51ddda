"""The `triton` column of the op table where a format string does not do.

What eager *on CUDA* computes decides (ATen/native/cuda): these are the operations of its kernels, op by op. The
functions take the operands as text and the node, and give the operation as text in the computation dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from snn_compile.errors import Reject
from snn_compile.lowering.triton.literals import TRITON_DTYPES, literal

Expression = Callable[[list[str], fx.Node], str]


def _dtype(node: fx.Node) -> torch.dtype:
    """The computation dtype of an op whose result has the promoted dtype of its operands."""
    dtype = node.meta["val"].dtype
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _is_float(node: fx.Node) -> bool:
    return node.meta["val"].dtype.is_floating_point


def _alpha(node: fx.Node) -> float | int:
    return node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)  # type: ignore[return-value]


def _axpy(a: str, b: str, sign: int, node: fx.Node) -> str:
    """``a + sign*alpha*b``; nvcc contracts this very functor to one fused multiply-add."""
    alpha = _alpha(node)
    if node.meta["val"].dtype == torch.bool:
        return f"{a} | {b}"
    if alpha == 1:
        return f"{a} + {b}" if sign > 0 else f"{a} - {b}"
    factor = literal(sign * alpha, _dtype(node))
    return f"tl.fma({factor}, {b}, {a})" if _is_float(node) else f"{a} + {factor} * {b}"


def add(operands: list[str], node: fx.Node) -> str:
    return _axpy(operands[0], operands[1], 1, node)


def sub(operands: list[str], node: fx.Node) -> str:
    return _axpy(operands[0], operands[1], -1, node)


def rsub(operands: list[str], node: fx.Node) -> str:
    return _axpy(operands[1], operands[0], -1, node)


def mul(operands: list[str], node: fx.Node) -> str:
    return f"{operands[0]} {'&' if node.meta['val'].dtype == torch.bool else '*'} {operands[1]}"


def divide(a: str, b: str, node: fx.Node) -> str:
    """Rounded to nearest; Triton's `/` is that for fp64 only."""
    return f"{a} / {b}" if _dtype(node) == torch.float64 else f"tl.div_rn({a}, {b})"


def div(operands: list[str], node: fx.Node) -> str:
    """Eager multiplies by the reciprocal of a Python number, rounded (div_true_kernel_cuda)."""
    divisor = node.args[1]
    if isinstance(divisor, fx.Node):
        return divide(operands[0], operands[1], node)
    dtype = _dtype(node)
    inverse = torch.ones((), dtype=dtype) / torch.tensor(divisor, dtype=torch.float64).to(dtype)
    return f"{operands[0]} * {literal(inverse.item(), dtype, arithmetic=True)}"


def addcmul(operands: list[str], node: fx.Node) -> str:
    """``a + value*b*c``; nvcc contracts the last product and the sum (PointwiseOpsKernel.cu)."""
    a, b, c = operands
    value = node.kwargs.get("value", 1)
    if value != 1:
        b = f"({literal(value, _dtype(node))} * {b})"  # type: ignore[arg-type]
    return f"tl.fma({b}, {c}, {a})" if _is_float(node) else f"{a} + {b} * {c}"


def neg(operands: list[str], node: fx.Node) -> str:
    """Triton's unary minus is ``0 - x``, which loses the sign of zero."""
    return f"{operands[0]} * -1.0" if _is_float(node) else f"-{operands[0]}"


def sign(operands: list[str], node: fx.Node) -> str:
    if node.meta["val"].dtype == torch.bool:
        return operands[0]
    dtype = TRITON_DTYPES[_dtype(node)]
    return f"({operands[0]} > 0).to({dtype}) - ({operands[0]} < 0).to({dtype})"


def absolute(operands: list[str], node: fx.Node) -> str:
    return operands[0] if node.meta["val"].dtype in (torch.bool, torch.uint8) else f"tl.abs({operands[0]})"


def _extremum(name: str, a: str, b: str, node: fx.Node) -> str:
    """Both operands' NaN go through, and -0 is less than 0, as in eager."""
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        return f"{a} {'|' if name == 'maximum' else '&'} {b}"
    if not dtype.is_floating_point:
        return f"tl.{name}({a}, {b})"
    return f"tl.{name}({a}, {b}, propagate_nan=tl.PropagateNan.ALL)"


def maximum(operands: list[str], node: fx.Node) -> str:
    return _extremum("maximum", operands[0], operands[1], node)


def minimum(operands: list[str], node: fx.Node) -> str:
    return _extremum("minimum", operands[0], operands[1], node)


def relu(operands: list[str], node: fx.Node) -> str:
    return maximum([operands[0], literal(0, _dtype(node))], node)


def clamp(operands: list[str], node: fx.Node) -> str:
    given: dict[int, object] = dict(enumerate(node.args[1:3]))
    given |= {i: node.kwargs[k] for i, k in enumerate(("min", "max")) if k in node.kwargs}
    bounds = iter(operands[1:])
    value = operands[0]
    if given.get(0) is not None or "hardtanh" in str(node.target):
        value = maximum([value, next(bounds)], node)
    if given.get(1) is not None or "hardtanh" in str(node.target):
        value = minimum([value, next(bounds)], node)
    return value


def rounding(function: str) -> Expression:
    """floor, ceil, trunc, round: integers are what they are."""
    return lambda operands, node: f"{function}({operands[0]})" if _is_float(node) else operands[0]


def fmod(operands: list[str], node: fx.Node) -> str:
    return f"libdevice.fmod({operands[0]}, {operands[1]})" if _is_float(node) else f"{operands[0]} % {operands[1]}"


def signbit(operands: list[str], node: fx.Node) -> str:
    """The sign of the bits: true for -0 and for a negative NaN."""
    dtype = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    if not dtype.is_floating_point:
        return f"{operands[0]} < 0"
    return f"{operands[0]}.to({'tl.int64' if dtype == torch.float64 else 'tl.int32'}, bitcast=True) < 0"


def truth(operand: str, node: fx.Node, i: int) -> str:
    value = node.args[i]
    is_bool = isinstance(value, fx.Node) and value.meta["val"].dtype == torch.bool
    return operand if is_bool and _all_bool(node) else f"({operand} != 0)"


def _all_bool(node: fx.Node) -> bool:
    return all(n.meta["val"].dtype == torch.bool for n in node.all_input_nodes)


def logical(operator: str) -> Expression:
    return lambda operands, node: f" {operator} ".join(truth(o, node, i) for i, o in enumerate(operands))


def logical_not(operands: list[str], node: fx.Node) -> str:
    return f"{operands[0]} == 0"


def bitwise_not(operands: list[str], node: fx.Node) -> str:
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        return f"{operands[0]} == 0"
    return f"{operands[0]} ^ 255" if dtype == torch.uint8 else f"~{operands[0]}"


def shift(operator: str) -> Expression:
    """``a << b`` or ``a >> b`` of integers; all bits are shifted out where b is negative or no less than their number."""

    def expression(operands: list[str], node: fx.Node) -> str:
        (a, b), by, dtype = operands, node.args[1], node.meta["val"].dtype
        bits = 8 * dtype.itemsize
        nothing = f"{a} ^ {a}" if operator == "<<" or dtype == torch.uint8 else f"{a} >> {bits - 1}"
        if isinstance(by, fx.Node):
            return f"tl.where(({b} < 0) | ({b} >= {bits}), {nothing}, {a} {operator} {b})"
        return f"{a} {operator} {b}" if 0 <= by < bits else nothing  # type: ignore[operator]

    return expression


def heaviside(operands: list[str], node: fx.Node) -> str:
    step = f"({operands[0]} > 0)"
    if node.meta["val"].dtype != torch.bool:
        step += f".to({TRITON_DTYPES[_dtype(node)]})"
    return f"tl.where({operands[0]} == 0, {operands[1]}, {step})"


def sqrt(operands: list[str], node: fx.Node) -> str:
    return f"tl.sqrt({operands[0]})" if _dtype(node) == torch.float64 else f"tl.sqrt_rn({operands[0]})"


def reciprocal(operands: list[str], node: fx.Node) -> str:
    return divide("1.0", operands[0], node)


def sigmoid(operands: list[str], node: fx.Node) -> str:
    denominator = f"1.0 + libdevice.exp(-{operands[0]})"
    return divide("1.0", f"({denominator})" if _dtype(node) == torch.float64 else denominator, node)


def power(operands: list[str], node: fx.Node) -> str:
    """Eager's special exponents, in its order of multiplication; bf16 and fp16 round after each (pow_tensor_scalar)."""
    base, exponent = operands[0], node.args[1]
    dtype = node.meta["val"].dtype
    special = exponent if isinstance(exponent, (int, float)) and isinstance(node.args[0], fx.Node) else None
    if special == 0:
        return f"tl.full((), 1, {TRITON_DTYPES[_dtype(node)]})"
    if special == 1:
        return base
    if special in (2, 3, -2):
        helper = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "")
        square = f"{helper}({base} * {base})"
        if special == 2:
            return f"{base} * {base}"
        return f"{square} * {base}" if special == 3 else divide("1.0", square, node)
    if not dtype.is_floating_point:
        raise Reject(f"an integer power with exponent {exponent} has no Triton kernel", node=node.name)
    if special == 0.5:
        return sqrt(operands, node)
    if special == -0.5:
        return f"libdevice.rsqrt({base})"
    return reciprocal(operands, node) if special == -1 else f"libdevice.pow({base}, {operands[1]})"
