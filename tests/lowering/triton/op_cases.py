"""Every overload of the op table as a one-op recurrence, run on special values and compared with eager."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from snn_compile.ir.recurrence import Output, Recurrence, TimeSeries
from snn_compile.lowering.launch import run_forward
from snn_compile.lowering.ops import CONSTANTS, TABLE
from snn_compile.lowering.triton.target import TritonTarget

#: Operands of an overload: a letter is a tensor of the tested dtype (B: of bool), anything else is that constant.
FLOAT_CASES: dict[str, list[tuple[Any, ...]]] = {
    "add.Tensor": [("x", "y"), ("x", 0.1), ("x", "y", {"alpha": 0.3})],
    "add.Scalar": [("x", 0.7)],
    "sub.Tensor": [("x", "y"), ("x", 0.1), ("x", "y", {"alpha": 3})],
    "sub.Scalar": [("x", 1e-40)],
    "rsub.Scalar": [("x", 1), ("x", 0.3, 0.7)],
    "rsub.Tensor": [("x", "y")],
    "mul.Tensor": [("x", "y"), ("x", 0.1), ("x", -0.0)],
    "mul.Scalar": [("x", 3), ("x", math.inf)],
    "div.Tensor": [("x", "y"), ("x", 2.0), ("x", -0.125)],
    "div.Scalar": [("x", 4)],
    "clamp.default": [("x", -0.3, 1), ("x", None, 0.1), ("x", {"min": 0.1}), ("x", {"max": 0.1})],
    "clamp.Tensor": [("x", "y", "z")],
    "hardtanh.default": [("x",), ("x", -0.3, 0.7)],
    "clamp_min.default": [("x", 0.1)],
    "clamp_min.Tensor": [("x", "y")],
    "clamp_max.default": [("x", 0.1)],
    "clamp_max.Tensor": [("x", "y")],
    "where.self": [("B", "x", "y")],
    "where.ScalarOther": [("B", "x", 0.1)],
    "where.ScalarSelf": [("B", 0.1, "x")],
    "pow.Tensor_Scalar": [("x", e) for e in (0, 1, 2, 3, 0.5, -0.5, -1, -2, 1.7)],
    "pow.Tensor_Tensor": [("x", "y")],
    "pow.Scalar": [(1.7, "x")],
    "fmod.Scalar": [("x", 0.7)],
    "copysign.Scalar": [("x", -0.0)],
    "_to_copy.default": [("x", {"dtype": d}) for d in (torch.float64, torch.bfloat16, torch.float16, torch.bool)],
}
INTEGER_CASES: dict[str, list[tuple[Any, ...]]] = {
    "bitwise_not.default": [("x",)],
    **{f"bitwise_{op}.Tensor": [("x", "y")] for op in ("and", "or", "xor")},
    **{f"bitwise_{op}.Scalar": [("x", 6)] for op in ("and", "or", "xor")},
    **{f"bitwise_{side}_shift.Tensor": [("x", "y")] for side in ("left", "right")},
    **{f"bitwise_{side}_shift.Tensor_Scalar": [("x", 3), ("x", 70), ("x", -1)] for side in ("left", "right")},
    **{f"__{side}shift__.{kind}": [("x", b)] for side in ("l", "r") for kind, b in (("Scalar", 2), ("Tensor", "y"))},
    "add.Tensor": [("x", "y"), ("x", 1), ("x", "y", {"alpha": 3}), ("x", 0.5)],
    "sub.Tensor": [("x", 1)],
    "rsub.Scalar": [("x", 7)],
    "mul.Tensor": [("x", "y"), ("x", 2.5)],
    "div.Tensor": [("x", "y")],
    "neg.default": [("x",)],
    "abs.default": [("x",)],
    "sign.default": [("x",)],
    "fmod.Scalar": [("x", 3)],
    "signbit.default": [("x",)],
    "maximum.default": [("x", "y")],
    "clamp.default": [("x", 0, 5)],
    "where.ScalarOther": [("B", "x", 0)],
    "ge.Scalar": [("x", 0.5), ("x", 2)],
    "floor.default": [("x",)],
    "logical_not.default": [("x",)],
    "sigmoid.default": [("x",)],
    "pow.Tensor_Scalar": [("x", 2), ("x", 3)],
    "_to_copy.default": [("x", {"dtype": d}) for d in (torch.float32, torch.bool, torch.int16, torch.bfloat16)],
}
BOOL_CASES: dict[str, list[tuple[Any, ...]]] = {
    "add.Tensor": [("x", "y")],
    "mul.Tensor": [("x", "y"), ("x", 0.5)],
    "maximum.default": [("x", "y")],
    "bitwise_not.default": [("x",)],
    "bitwise_and.Tensor": [("x", "y")],
    "logical_or.default": [("x", "y")],
    "logical_xor.default": [("x", "y")],
    "eq.Tensor": [("x", "y")],
    "where.self": [("B", "x", "y")],
    "_to_copy.default": [("x", {"dtype": d}) for d in (torch.float32, torch.int64, torch.float16)],
}


def float_arguments(overload: str) -> list[tuple[Any, ...]]:
    """Overloads that only take tensors, and comparisons, need no entry."""
    if overload in FLOAT_CASES:
        return FLOAT_CASES[overload]
    tensors = [a for a in _overload(overload)._schema.arguments if str(a.type) == "Tensor"]
    scalar = [0.1] if overload.endswith(".Scalar") else []
    return [(*"xyz"[: len(tensors)], *scalar)]


def arguments(overload: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    if dtype == torch.bool:
        return BOOL_CASES.get(overload, [])
    if not dtype.is_floating_point:
        return INTEGER_CASES.get(overload, [])
    return [] if "bitwise" in overload or "shift" in overload else float_arguments(overload)


#: Eager on the CPU: the square root of its vector library is not correctly rounded, and its sigmoid has an exponential
#: of its own.
ROUNDED_OTHERWISE_ON_CPU = ("sqrt.default", "sigmoid.default")


def check_op(overload: str, dtype: torch.dtype, device: str = "cpu") -> None:
    for given in arguments(overload, dtype):
        rec, operands = one_op(overload, given, dtype)
        operands = [o.to(device) for o in operands]
        (result,) = run_forward(rec, TritonTarget(), operands, 1)
        expected = eager(rec, overload, given, operands)
        exact = TABLE[overload].exact and not (device == "cpu" and overload in ROUNDED_OTHERWISE_ON_CPU)
        tolerance = 0 if exact or not expected.is_floating_point() else 4 * torch.finfo(expected.dtype).eps
        _compare(f"{overload}{given}", operands, result, expected, tolerance)


def eager(rec: Recurrence, overload: str, given: Sequence[Any], operands: Sequence[Tensor]) -> Tensor:
    """Eager on CUDA. Where the CPU rounds differently, what CUDA does is spelled out."""
    x = operands[0]
    if x.device.type != "cpu":
        return rec(*operands, steps=1)[0]
    numbers = any(isinstance(g, (int, float)) for g in given) or isinstance(given[-1], dict)
    if overload.split(".")[0] in ("add", "sub", "rsub") and numbers and x.dtype in (torch.bfloat16, torch.float16):
        # the CPU rounds numbers to the dtype of the tensor, CUDA keeps them in fp32
        return rec(*(o.float() for o in operands), steps=1)[0].to(x.dtype)
    if overload == "pow.Tensor_Scalar" and abs(given[1]) == 0.5:  # the CPU does so for fp32 and fp64 alone
        return x.sqrt() if given[1] > 0 else x.rsqrt()
    result = rec(*operands, steps=1)[0]
    return result + 0.0 if overload == "relu.default" and x.is_floating_point() else result  # fmax(-0, 0) is 0


def check_division_by_a_number(dtype: torch.dtype) -> None:
    """On CUDA eager multiplies by the reciprocal, on the CPU it divides: the kernel differs from the CPU's eager."""
    rec, operands = one_op("div.Tensor", ("x", 3.0), dtype)
    (result,) = run_forward(rec, TritonTarget(), operands, 1)
    wide = torch.promote_types(dtype, torch.float32)
    inverse = torch.ones((), dtype=wide) / torch.tensor(3.0, dtype=wide)
    expected = (operands[0].to(wide) * inverse).to(dtype)
    _compare("div by 3.0", operands, result, expected, 0)


def one_op(overload: str, given: Sequence[Any], dtype: torch.dtype) -> tuple[Recurrence, list[Tensor]]:
    """A recurrence without state, ``y[t] = op(x[t], ...)``, as a graph: tracing would decompose some overloads."""
    graph, nodes = fx.Graph(), {}
    values = {"x": _values(dtype, 0), "y": _values(dtype, 1), "z": _values(dtype, 2), "B": _values(torch.bool, 0)}
    keywords = given[-1] if isinstance(given[-1], dict) else {}
    positional = given[:-1] if keywords else given
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name in [a for a in positional if isinstance(a, str)]:
            nodes[name] = graph.placeholder(name)
            nodes[name].meta["val"] = torch.empty(values[name].shape, dtype=values[name].dtype)
        args = [nodes.get(a, a) if isinstance(a, str) else a for a in positional]
        node = graph.call_function(_overload(overload), tuple(args), dict(keywords))
        fake = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
        node.meta["val"] = _overload(overload)(*fake, **keywords)
    graph.output([node])
    step = fx.GraphModule({}, graph)
    xs = tuple(TimeSeries(name, values[name].dtype) for name in nodes)
    rec = Recurrence("op", (), xs, (), (Output("result", node.meta["val"].dtype),), step)
    return rec, [values[name][None] for name in nodes]


def _overload(name: str) -> Any:
    packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def _values(dtype: torch.dtype, rotate: int) -> Tensor:
    generator = torch.Generator().manual_seed(rotate)
    if dtype == torch.bool:
        return torch.rand(589, generator=generator) < 0.5
    if not dtype.is_floating_point:
        return torch.randint(0 if dtype == torch.uint8 else -9, 10, (589,), generator=generator).to(dtype) | 1
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 1.0, -1.0, 3e38, 1e-40, 0.1, -88.0]
    pairs = torch.tensor(special).repeat(len(special)).roll(rotate)
    if rotate == 1:  # every special value meets every other
        pairs = torch.tensor(special).repeat_interleave(len(special))
    return torch.cat([pairs, torch.randn(333, generator=generator) * 3]).to(dtype)


def _compare(what: str, operands: Sequence[Tensor], result: Tensor, expected: Tensor, tolerance: float) -> None:
    assert result.dtype == expected.dtype, what
    a, b = result.double(), expected.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if tolerance:
        same |= (a - b).abs() <= tolerance * b.abs().clamp(min=torch.finfo(torch.float32).tiny)
    elif expected.dtype.is_floating_point:
        same &= (a.signbit() == b.signbit()) | a.isnan()
    wrong = (~same).flatten().nonzero().flatten().tolist()
    shown = [(*(o.flatten()[i].item() for o in operands), a.flatten()[i].item(), b.flatten()[i].item()) for i in wrong[:4]]
    assert not wrong, f"{what}: {len(wrong)} of {b.numel()} differ; operands, kernel, eager: {shown}"


ALL_OVERLOADS = sorted(TABLE)
ALL_CONSTANTS = sorted(CONSTANTS)
