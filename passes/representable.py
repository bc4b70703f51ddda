"""Which results of a step in bf16 or fp16 are rounded already: eager rounds each, which then changes nothing.

    s = H(h - 1); v' = s*0 + (1 - s)*h     ->     of these six ops none is rounded

- a whole number that the dtype holds: a spike, `1 - s`, `s*0`;
- a number times 1, 0 or -1, or plus 0;
- a difference that is only compared with 0: two numbers of a dtype are as far apart as its smallest number, at least, so
  that rounding keeps the difference's sign, and 0 comes of equal ones alone.

All of it holds for infinities and NaN as well. The operands of an op are taken to be rounded themselves.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

aten = torch.ops.aten

#: The largest whole number up to which a dtype holds all of them.
WHOLE = {torch.bfloat16: 1 << 8, torch.float16: 1 << 11}
#: The smallest positive number.
SMALLEST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
COMPARISONS = {aten.ge, aten.gt, aten.le, aten.lt, aten.eq, aten.ne}
DIFFERENCES, SUMS, PRODUCTS = {aten.sub, aten.rsub}, {aten.add, aten.sub, aten.rsub}, {aten.mul}
CREATIONS = {aten.zeros_like: 0, aten.ones_like: 1, aten.zeros: 0, aten.ones: 1, aten.new_zeros: 0, aten.new_ones: 1}
#: how many ops a whole number is followed through
DEPTH = 8


def is_representable(node: fx.Node) -> bool:
    """Whether the dtype of `node`, bf16 or fp16, holds what the op gives of rounded operands."""
    if whole(node) is not None or _only_sign_is_read(node):
        return True
    operands = _operands(node)
    if operands is None or _op(node) not in SUMS | PRODUCTS:
        return False
    neutral = 1 if _op(node) in PRODUCTS else 0
    return any(_is_within(whole(a), neutral) and _is_held(b, node.meta["val"].dtype) for a, b in (operands, operands[::-1]))


def whole(value: object, depth: int = DEPTH) -> tuple[int, int] | None:
    """Bounds of `value`, if it is a whole number in every lane, and one that its dtype holds."""
    if isinstance(value, (bool, int, float)):
        return (int(value), int(value)) if value in (0, 1, -1) else None
    if not isinstance(value, fx.Node) or value.op != "call_function" or not depth:
        return None
    dtype = value.meta["val"].dtype
    bounds = (0, 1) if dtype == torch.bool else _whole_result(value, depth - 1)
    return bounds if _is_within(bounds, WHOLE.get(dtype, 1 << 11)) else None


def _whole_result(node: fx.Node, depth: int) -> tuple[int, int] | None:
    op, dtype = _op(node), node.meta["val"].dtype
    if op in CREATIONS:
        return (CREATIONS[op], CREATIONS[op])
    if op == aten._to_copy:
        source = node.args[0]
        is_spike = isinstance(source, fx.Node) and source.meta["val"].dtype == torch.bool
        return (0, 1) if is_spike and dtype.is_floating_point else None
    operands = _operands(node)
    if operands is None or op not in SUMS | PRODUCTS:
        return None
    a, b = (whole(operand, depth) for operand in operands)
    if a is None or b is None:
        return None
    if op == aten.rsub:
        a, b = b, a
    ends = [_ENDS[op](x, y) for x in a for y in b]
    return (min(ends), max(ends))


_ENDS = {aten.add: operator.add, aten.sub: operator.sub, aten.rsub: operator.sub, aten.mul: operator.mul}


def _is_within(bounds: tuple[int, int] | None, size: int) -> bool:
    return bounds is not None and -size <= bounds[0] and bounds[1] <= size


def keeps_sign(node: fx.Node) -> bool:
    """Whether rounding leaves `node`, in bf16 or fp16, above, below or at 0."""
    dtype, operands = node.meta["val"].dtype, _operands(node)
    return dtype in WHOLE and _op(node) in DIFFERENCES and operands is not None and all(_is_apart(o, dtype) for o in operands)


def is_compared_with_zero(node: fx.Node, user: fx.Node) -> bool:
    """Whether `user` reads nothing of `node` but its sign."""
    zero = user.args[1] if _op(user) in COMPARISONS and user.args[0] is node else None
    return isinstance(zero, (int, float)) and zero == 0


def _only_sign_is_read(node: fx.Node) -> bool:
    return bool(node.users) and keeps_sign(node) and all(is_compared_with_zero(node, user) for user in node.users)


def _is_held(value: object, dtype: torch.dtype) -> bool:
    if isinstance(value, fx.Node):
        return value.meta["val"].dtype in (dtype, torch.bool)
    return bool(value == torch.tensor(value, dtype=torch.float64).to(dtype).item())


def _is_apart(value: object, dtype: torch.dtype) -> bool:
    """Whether every number of `dtype` is `value`, or as far from it as the smallest one."""
    if isinstance(value, fx.Node):
        return value.meta["val"].dtype == dtype
    single = torch.tensor(value, dtype=torch.float64).float()  # as which eager computes with it, if it does not round it
    gap = abs(single.double() - single.to(dtype).double()).item()
    return gap == 0 or gap >= SMALLEST[dtype]


def _operands(node: fx.Node) -> tuple[object, object] | None:
    """Both, where they are added, subtracted or multiplied as they are."""
    if node.op != "call_function" or len(node.args) < 2 or node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        return None
    first, second = node.args[:2]
    return (first, second) if all(isinstance(o, (fx.Node, bool, int, float)) for o in (first, second)) else None


def _op(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", None)
