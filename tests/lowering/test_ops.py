"""Every row of the op table, on the cpp target, against eager on CPU: dtypes, special values, lengths, tails.

Many calls of one dtype are the outputs of one recurrence, so that the table costs a few kernels a dtype.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx

from snn_compile.ir.recurrence import Const, Output, Recurrence, TimeSeries
from snn_compile.lowering.cpp.target import CppTarget
from snn_compile.lowering.launch import run_forward
from snn_compile.lowering.ops import CONSTANTS, DTYPES, TABLE, is_supported

TARGET = CppTarget()
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.uint8)
LENGTHS = (1, 7, 16, 1003)

#: one of 64 takes g++ six times as long
CALLS_A_KERNEL = 24

SHIFTS = [(f"bitwise_{side}_shift", "Tensor_Scalar") for side in ("left", "right")]
SHIFTS += [(f"__{side}shift__", "Scalar") for side in ("l", "r")]

#: What is passed for a number of the schema, by overload; None among them: the argument is left out.
NUMBERS: dict[str, tuple[float | int | None, ...]] = {
    "pow.Tensor_Scalar": (2, 3, 0.5, -0.5, -1, -2, 1, 0, 2.5, -1.3, 4),
    "pow.Scalar": (2.0, 0.3),
    "hardtanh.default": (None,),
    **{f"{name}.{kind}": (0, 1, 3, 7, 8, 31, 63, -1) for name, kind in SHIFTS},
}
#: Called with operands of other dtypes too: a dimensionless fp32 tensor `w`, an integer tensor `k`, a bool tensor.
MIXED = ("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "gt.Tensor", "maximum.default")
ANY_NUMBER = (0, 1, 0.1, -2.5, 3)
ALPHAS = (1, 0.3, -2)


@dataclass(frozen=True)
class Call:
    """One call of an overload: positions of tensors among the inputs (`x`, `y`, `z`, `condition`), and numbers."""

    overload: str
    args: tuple[object, ...]
    kwargs: tuple[tuple[str, object], ...] = ()

    @property
    def op(self) -> torch._ops.OpOverload:
        name, overload = self.overload.split(".")
        return getattr(getattr(torch.ops.aten, name), overload)

    def __str__(self) -> str:
        return f"{self.overload}({', '.join(map(str, [*self.args, *self.kwargs]))})"

    def on(self, tensors: dict[str, object]) -> object:
        return self.op(*(tensors.get(a, a) if isinstance(a, str) else a for a in self.args), **dict(self.kwargs))


@functools.cache
def calls(overload: str) -> list[Call]:
    """Every way in which the table's rows are called: made from the schema, so that a new row is covered at once."""
    if overload == "_to_copy.default":
        return [Call(overload, ("x",), (("dtype", d),)) for d in DTYPES]
    if overload in CONSTANTS:
        value = (0.1,) if overload == "full_like.default" else ()
        return [Call(overload, ("x", *value))] if overload.split(".")[0].endswith("_like") else []
    schema = Call(overload, ()).op._schema
    choices: list[tuple[object, ...]] = []
    names = iter("xyz")
    alphas: tuple[object, ...] = (None,)
    keyword = "alpha"
    for argument in schema.arguments:
        kind = str(argument.type)
        if argument.name in ("alpha", "value"):
            alphas, keyword = ALPHAS, argument.name
        elif kind in ("Tensor", "Optional[Tensor]"):
            choices.append(("condition" if argument.name == "condition" else next(names),))
        elif argument.name in ("min", "max"):
            choices.append((-1, 0.3, None) if argument.name == "min" else (0.7, 1, None))
        else:
            choices.append(NUMBERS.get(overload, ANY_NUMBER))
    made = []
    for args in itertools.product(*choices):
        if overload.startswith("clamp.default") and args[1:] == (None, None):
            continue
        if overload == "hardtanh.default":
            args = args[:1]
        for alpha in alphas:
            made.append(Call(overload, args, () if alpha in (None, 1) else ((keyword, alpha),)))
    if overload in MIXED:
        made += [Call(overload, args) for args in (("x", "w"), ("w", "x"), ("x", "k"), ("k", "x"), ("x", "condition"))]
    return made


# ------------------------------------------------------------------------------------------------------------- inputs


def special(dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return torch.tensor([False, True])
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        values = [0, 1, 2, 3, 5, 7, 100, info.max, info.min, *([] if info.min == 0 else [-1, -2, -3, -7])]
        return torch.tensor(values, dtype=dtype)
    info = torch.finfo(dtype)
    values = [0.0, 0.5, 1.0, 1.5, 2.5, 3.5, 0.1, 1e-3, 7.25, 20.0, 60.0, 89.0, 110.0, 8388609.0, 2.0**24 + 2]
    values += [info.max, info.tiny, info.tiny / 4, info.tiny * 0.75, info.eps, 1 - info.eps, 1 + info.eps]
    values += [-v for v in values] + [math.inf, -math.inf, math.nan]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def inputs(dtype: torch.dtype, length: int) -> dict[str, Tensor]:
    """Pairs of special values first, then random ones; each length sees another part of them."""
    generator = torch.Generator().manual_seed(length)
    values = special(dtype)
    pairs = torch.cartesian_prod(torch.arange(len(values)), torch.arange(len(values)))
    pairs = pairs[torch.randperm(len(pairs), generator=generator)][: length * 2 // 3]
    columns = []
    for i in range(3):
        chosen = values[pairs[:, i % 2]] if len(pairs) else values[:0]
        rest = length - len(chosen)
        if dtype.is_floating_point:
            random = (torch.randn(rest, generator=generator, dtype=torch.float64) * 3).to(dtype)
        else:
            top = 2 if dtype == torch.bool else 9
            random = torch.randint(0, top, (rest,), generator=generator).to(dtype)
        columns.append(torch.cat([chosen, random]))
    condition = torch.randint(0, 2, (length,), generator=generator).bool()
    k = torch.randint(-300, 300, (length,), generator=generator)
    w = torch.tensor(0.1)
    return {"x": columns[0], "y": columns[1], "z": columns[2].flip(0), "condition": condition, "k": k, "w": w}


# ------------------------------------------------------------------------------------------------------ the recurrence


def _refused(call: Call, dtype: torch.dtype) -> bool:
    """Eager, or the table, refuses the call for this dtype."""
    if dtype == torch.bool and ("pow" in call.overload or "shift" in call.overload):
        return True
    if call.overload.startswith("clamp") and dtype == torch.uint8 and -1 in call.args:
        return True  # `test_bounds_out_of_range`
    if call.overload.startswith("fmod") and not dtype.is_floating_point and not (type(call.args[1]) is int and call.args[1] > 0):
        return True  # `test_integer_divisors`
    try:
        call.on(inputs(dtype, 4))
    except (RuntimeError, TypeError):
        return True
    return False


@functools.cache
def accepted(dtype: torch.dtype) -> list[Call]:
    every = itertools.chain.from_iterable(calls(o) for o in (*TABLE, *CONSTANTS))
    return [call for call in every if not _refused(call, dtype)]


def table(dtype: torch.dtype, group: list[Call]) -> Recurrence:
    """One recurrence whose outputs are the calls of the group."""
    graph = fx.Graph()
    placeholders, metas = {}, {}
    for name, tensor in inputs(dtype, 3).items():
        placeholders[name] = graph.placeholder(name)
        placeholders[name].meta["val"] = metas[name] = tensor.to("meta")
    outputs, specs = [], []
    for call in group:
        args = tuple(placeholders.get(a, a) if isinstance(a, str) else a for a in call.args)
        node = graph.call_function(call.op, args, dict(call.kwargs))
        node.meta["val"] = call.on(metas)
        assert is_supported(node), call
        outputs.append(node)
        specs.append(Output(f"out{len(specs)}", node.meta["val"].dtype))
    graph.output(tuple(outputs))
    xs = tuple(TimeSeries(n, metas[n].dtype) for n in placeholders if n != "w")
    consts = (Const("w", torch.float32, is_scalar=True),)
    return Recurrence("table", (), xs, consts, tuple(specs), fx.GraphModule({}, graph))


@functools.cache
def results(dtype: torch.dtype, length: int) -> dict[Call, tuple[Tensor, Tensor]]:
    """For each call: what the kernel gives and what eager gives."""
    tensors = inputs(dtype, length)
    operands = [t.unsqueeze(0) if t.dim() else t for t in tensors.values()]
    both = {}
    for start in range(0, len(accepted(dtype)), CALLS_A_KERNEL):
        group = accepted(dtype)[start : start + CALLS_A_KERNEL]
        got = run_forward(table(dtype, group), TARGET, operands, 1)
        both |= {call: (g[0], call.on(tensors)) for call, g in zip(group, got, strict=True)}
    return both  # type: ignore[return-value]


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("bound, supported", [(-1, False), (0, True), (255, True), (256, False)])
def test_bounds_out_of_range(bound: int, supported: bool) -> None:
    """What a bound that a uint8 cannot hold does differs between versions of PyTorch: left to PyTorch."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(3, dtype=torch.uint8)
    node = graph.call_function(torch.ops.aten.clamp_min.default, (x, bound))
    node.meta["val"] = torch.empty(3, dtype=torch.uint8)
    assert is_supported(node) is supported


@pytest.mark.parametrize("divisor, supported", [(3, True), (0, False), (-1, False), ("x", False)])
def test_integer_divisors(divisor: int | str, supported: bool) -> None:
    """Eager raises where an integer is divided by zero, and the smallest one by -1 traps: only numbers over zero are taken."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    op = torch.ops.aten.fmod.Tensor if divisor == "x" else torch.ops.aten.fmod.Scalar
    node = graph.call_function(op, (x, x if divisor == "x" else divisor))
    x.meta["val"] = node.meta["val"] = torch.empty(3, dtype=torch.int32)
    assert is_supported(node) is supported


def ulps(got: Tensor, expected: Tensor, near_zero_is_equal: bool = False) -> Tensor:
    """Distance in units in the last place; 1 between the two zeros, infinite where only one is NaN."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.dtype.itemsize]
    if not expected.dtype.is_floating_point:
        return torch.where(got == expected, 0.0, math.inf).double()
    views = (got.view(bits), expected.view(bits))
    a, b = (torch.where(v < 0, torch.iinfo(bits).min - v - 1, v).long() for v in views)
    # (a difference over zero may be more than an int64 holds, and a double does not hold all of them)
    distance = torch.where((a < 0) == (b < 0), (a - b).abs().double(), (a.double() - b.double()).abs())
    if near_zero_is_equal:  # eager's transcendentals may flush subnormal numbers
        tiny = 2 * torch.finfo(expected.dtype).tiny
        distance[(got.abs() <= tiny) & (expected.abs() <= tiny)] = 0
    nan = torch.isnan(got) | torch.isnan(expected)
    return torch.where(nan, torch.where(torch.isnan(got) & torch.isnan(expected), 0.0, math.inf), distance)


def in_last_lanes(call: Call) -> float:
    """Units in the last place by which eager differs from itself in the lanes that fill no vector.

    There a scalar loop rounds ``alpha*b``, takes the other one of two zeros, and calls libm: Sleef's hyperbolic functions
    overflow early, and its `fmod` gives NaN for large quotients.
    """
    extrema = ("maximum.default", "minimum.default", "clamp.Tensor", "clamp_min.Tensor", "clamp_max.Tensor")
    name = call.overload.split(".")[0]
    if "alpha" in dict(call.kwargs) or name in ("fmod", "sinh", "cosh"):
        return math.inf
    return 2 if name == "sigmoid" else float(call.overload in extrema)


def _in_one_process(dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """All calls of a dtype are compiled together: by one of the processes that share the tests."""
    name = str(dtype).split(".")[1]
    return pytest.param(dtype, id=name, marks=pytest.mark.xdist_group(f"ops in {name}"))


@pytest.mark.parametrize("dtype", [_in_one_process(d) for d in (*FLOATS, *INTEGERS, torch.bool)])
@pytest.mark.parametrize("overload", (*TABLE, *CONSTANTS))
def test_row_equals_eager(overload: str, dtype: torch.dtype) -> None:
    allowed = TABLE[overload].cpp_ulps if overload in TABLE else 0
    for length in LENGTHS:
        tensors = inputs(dtype, length)
        for call, (got, expected) in results(dtype, length).items():
            if call.overload != overload or (length == 1 and "k" in call.args):  # a single element counts as a number
                continue
            assert got.dtype == expected.dtype, call
            distance = ulps(got, expected, near_zero_is_equal=allowed > 0)
            distance[length // 64 * 64 :] -= in_last_lanes(call)
            distance.nan_to_num_(nan=0, posinf=math.inf, neginf=-math.inf)
            worst = int(distance.nan_to_num(posinf=1e300).argmax())
            operands = {n: t.expand(length)[worst].item() for n, t in tensors.items()}
            gives = f"{got[worst].item()!r}, eager {expected[worst].item()!r}"
            assert distance[worst] <= allowed, f"{call} gives {gives} for {operands}"


def test_every_row_is_called() -> None:
    called = {c.overload for dtype in (torch.float32, torch.int64, torch.bool) for c in accepted(dtype)}
    assert set(TABLE) - called == set()
