"""Random recurrences against the eager loop: forward bit for bit, gradients to rounding.

Two ways, for what each costs. *Interpreted*: the unrolled graph goes through every pass, and the recurrences found run step by
step in eager (`Recurrence.__call__`), which checks the rewriting. *Compiled*: a step is traced and its C++ kernels are
called at several T, which checks the kernels.

    python tests/test_random_steps.py --examples 2000 --seed 1
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import time
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from snn_compile.config import Config
from snn_compile.ir.loop import Loop, verify
from snn_compile.ir.recurrence import Recurrence
from snn_compile.ir.values import example
from snn_compile.lowering import ops, registration, targets
from snn_compile.pipeline import Report, run_pipeline
from tests.random_steps import EXACT, INEXACT, OPAQUE, Program, programs

#: relative to the largest gradient of an operand; the order of additions over t and lanes is not eager's
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}

SETTINGS = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "print_blob": False,
}
seen: collections.Counter[str] = collections.Counter()


# ------------------------------------------------------------------------------------------------------------- comparing


def gradients(results, operands):  # type: ignore[no-untyped-def]
    leaves = [o for o in operands if o.requires_grad]
    wanted = [r for r in results if r.requires_grad]
    if not wanted or not leaves:
        return []
    weights = [torch.linspace(0.5, 1.5, r.numel(), dtype=r.dtype).view(r.shape) for r in wanted]
    return torch.autograd.grad(wanted, leaves, weights, allow_unused=True)


def compare(program, expected, got, operands, got_operands):  # type: ignore[no-untyped-def]
    dtype = program.dtype
    for a, b in zip(expected, got, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
    if dtype not in TOLERANCE:
        return
    wanted = gradients(expected, operands)
    if any(g is not None and not g.isfinite().all() for g in wanted):
        seen["gradient of eager overflows"] += 1
        return
    found = gradients(got, got_operands)
    if not wanted:  # what needs a gradient comes too late in the loop to reach a result: for the kernel it is zero
        assert all(g is None or not g.any() for g in found)
        return
    found = found or [None] * len(wanted)
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        if a is None or b is None:
            assert (a is None or not a.any()) and (b is None or not b.any())
            continue
        assert a.dtype == b.dtype and a.shape == b.shape
        if distance(a, b) > TOLERANCE[dtype]:
            # a recurrence that amplifies rounding: then eager's own gradient is as far from the exact one
            assert distance(a, b) <= 10 * error_of_eager(program, i), f"{b} is not {a}"
            seen["gradients that eager itself gets wrong"] += 1
        else:
            torch.testing.assert_close(b, a, rtol=0, atol=TOLERANCE[dtype] * float(a.abs().max()))
            seen["gradients compared"] += 1


def distance(a, b) -> float:  # type: ignore[no-untyped-def]
    """Relative to the largest gradient of the operand."""
    return float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30))


def error_of_eager(program, i: int) -> float:
    """How far eager is from the exact gradient of operand `i`: in fp32 measured against fp64, in fp64 that error scaled.

    Where nothing of the fp32 gradient is right, it says nothing about fp64: the error is unknown.
    """
    numbers = program.operands()
    exact, rounded = (_eager_gradient(program, numbers, dtype, i) for dtype in (torch.float64, torch.float32))
    error = distance(exact, rounded) if rounded.isfinite().all() else float("inf")
    if program.dtype == torch.float32:
        return error
    return error * 2.0**-29 if error < 1e-2 else float("inf")


def _eager_gradient(program, numbers, dtype: torch.dtype, i: int):  # type: ignore[no-untyped-def]
    operands = [o.detach().to(dtype).requires_grad_(o.requires_grad) for o in numbers]
    return gradients(dataclasses.replace(program, dtype=dtype).loop(*operands), operands)[i]


def again(operands):  # type: ignore[no-untyped-def]
    """The same tensors as other leaves, strides kept."""
    return [o.detach().requires_grad_(o.requires_grad) for o in operands]


# ----------------------------------------------------------------------------------------------------------- interpreted


class Interpreted:
    """A target without code: the recurrence runs as it is meant."""

    name = "interpreted"

    def missing(self) -> None:
        return None

    def kernel(self, recurrence: Recurrence, direction: str, layout) -> InterpretedRegion:  # type: ignore[no-untyped-def]
        return InterpretedRegion(recurrence)

    def direct(self, namespace: str) -> None:
        return None


@dataclasses.dataclass
class InterpretedRegion:
    """A region of a stepped recurrence: one step, no states."""

    recurrence: Recurrence

    def bind(self, tensors, placement, steps):  # type: ignore[no-untyped-def]
        n, m = len(self.recurrence.xs), len(self.recurrence.ys)

        def run(tensors) -> None:  # type: ignore[no-untyped-def]
            operands = [*(x.unsqueeze(0) for x in tensors[:n]), *tensors[n:-m]]
            for result, value in zip(tensors[-m:], self.recurrence(*operands, steps=steps), strict=True):
                result.copy_(value[0])

        return run


def run_forward(recurrence: Recurrence, target, operands, steps):  # type: ignore[no-untyped-def]
    return [r.clone() for r in recurrence(*operands, steps=steps)]


def run_backward(recurrence: Recurrence, target, operands, cotangents, steps):  # type: ignore[no-untyped-def]
    """The documented meaning of `Recurrence.backward`."""
    shape = recurrence.shape(operands)
    n, m = len(recurrence.carries), len(recurrence.xs)
    inits, xs, consts = operands[:n], operands[n : n + m], operands[n + m :]
    consts = [c if s.is_scalar else c.expand(shape) for c, s in zip(consts, recurrence.consts, strict=True)]
    zero = {s: torch.zeros(shape, dtype=s) for s in ops.DTYPES}

    def inputs(t: int):  # type: ignore[no-untyped-def]
        return [x[steps - 1 - t if s.reverse else t].expand(shape) for x, s in zip(xs, recurrence.xs, strict=True)]

    states = [[i.expand(shape) for i in inits]]
    for t in range(steps):
        states.append(list(recurrence.step(*states[-1], *inputs(t), *consts))[:n])
    ys, carries = recurrence.differentiable_ys, recurrence.differentiable_carries
    given = [None if c is None else c.movedim(y.time_dim, 0) for c, y in zip(cotangents, ys, strict=False)]
    finals = iter(cotangents[len(ys) :])
    cts = [next(finals) if c.is_result else None for c in carries]
    cts = [zero[c.dtype] if ct is None else ct for c, ct in zip(carries, cts, strict=True)]
    series = [torch.zeros((steps, *shape), dtype=x.dtype) for x in recurrence.xs if x.needs_grad]
    totals = [torch.zeros(shape, dtype=ops.opmath(c.dtype)) for c in recurrence.consts if c.needs_grad]
    where = [x.reverse for x in recurrence.xs if x.needs_grad]
    for t in reversed(range(steps)):
        now = [zero[y.dtype] if g is None else g[steps - 1 - t if y.reverse else t] for g, y in zip(given, ys, strict=True)]
        out = recurrence.backward(*states[t], *inputs(t), *consts, *cts, *now)
        cts = [zero[c.dtype] if o is None else o.expand(shape) for o, c in zip(out, carries, strict=False)]
        rest = list(out[len(carries) :])
        for s, reverse in zip(series, where, strict=True):
            value = rest.pop(0)
            if value is not None:
                s[steps - 1 - t if reverse else t] = value
        for total in totals:
            value = rest.pop(0)
            if value is not None:
                total += value
    starts = [ct.clone() for ct, c in zip(cts, carries, strict=True) if c.init_needs_grad]
    return [*starts, *series, *totals]


@contextlib.contextmanager
def interpreted():  # type: ignore[no-untyped-def]
    target = Interpreted()
    with (
        mock.patch.object(targets, "_target", lambda kind: target),
        mock.patch.object(registration, "run_forward", run_forward),
        mock.patch.object(registration, "run_backward", run_backward),
    ):
        yield


def unrolled(program: Program, operands) -> fx.GraphModule:  # type: ignore[no-untyped-def]
    """The graph Dynamo would give, with its examples."""
    graph = fx.Graph()
    tracer = fx.Tracer()
    tracer.graph, tracer.root, tracer.tensor_attrs, tracer.submodule_paths = graph, torch.nn.Module(), {}, {}
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(o) for o in operands]
        with _as_graph(graph, tracer, fakes) as proxies:
            results = program.loop(*proxies)
        graph.output(tuple(r.node for r in results))
    return fx.GraphModule({}, graph)


@contextlib.contextmanager
def _as_graph(graph, tracer, fakes):  # type: ignore[no-untyped-def]
    proxies = []
    for i, fake in enumerate(fakes):
        proxies.append(fx.Proxy(graph.placeholder(f"l_x{i}_"), tracer))
        proxies[-1].node.meta["example_value"] = fake

    create = fx.Graph.create_node

    def recording(self, op, target, args=(), kwargs=None, name=None, type_expr=None):  # type: ignore[no-untyped-def]
        node = create(self, op, target, args, kwargs or {}, name, type_expr)
        if self is graph and op in ("call_function", "call_method"):
            values, keywords = fx.node.map_arg((node.args, node.kwargs), example)
            function = getattr(values[0], str(target)) if op == "call_method" else target
            node.meta["example_value"] = function(*(values[1:] if op == "call_method" else values), **keywords)
        return node

    with mock.patch.object(fx.Graph, "create_node", recording):
        yield proxies


def check(program: Program, kernels: bool = False) -> Report:
    """`kernels`: the recurrences run as generated C++; else step by step in eager."""
    operands = program.operands()
    try:
        expected = program.loop(*operands)
    except RuntimeError:  # a state that grows by broadcasting: its steps cannot be stacked
        hypothesis.reject()
        raise
    got_operands = again(operands)
    gm = unrolled(program, operands)
    with contextlib.nullcontext() if kernels else interpreted():
        gm, report = run_pipeline(gm, Config(strict=True, step_from=4))
        for module in gm.modules():
            if isinstance(module, Loop):
                verify(module)
        got = fx.Interpreter(gm).run(*got_operands)
        compare(program, expected, got, operands, got_operands)
    seen["examples, compiled" if kernels else "examples"] += 1
    seen["examples with a recurrence"] += bool(report.recurrences)
    seen["recurrences"] += len(report.recurrences)
    for rejection in report.rejections:
        seen["left alone: " + rejection.reason.split(":")[0].split("'")[0]] += 1
    return report


# ------------------------------------------------------------------------------------------------------------------ tests


def run(examples: int, seed: int | None = None, kernels: bool = False, **what) -> None:  # type: ignore[no-untyped-def]
    """`examples` programs; those of `seed`, or always the same ones."""

    @settings(max_examples=examples, **{**SETTINGS, "derandomize": seed is None})
    @given(programs(**what))
    def test(program: Program) -> None:
        check(program, kernels)

    (test if seed is None else hypothesis.seed(seed)(test))()


EXACT_OPS, ALL_OPS = (*EXACT, *OPAQUE), (*EXACT, *INEXACT, *OPAQUE)
FAMILIES = {
    "fp32 and fp64": ({"ops": ALL_OPS}, 90),
    "long loops": ({"ops": EXACT_OPS, "max_steps": 300}, 25),
    "bf16 and fp16": ({"ops": EXACT_OPS, "dtypes": (torch.bfloat16, torch.float16)}, 50),
    "neurons": ({"ops": ("spike", "leak", "reset", "compare", "where", "both")}, 50),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_keep_the_meaning(family):
    """Interpreted: 215 programs in all."""
    what, examples = FAMILIES[family]
    seen.clear()
    run(examples, **what)
    assert seen["examples"] >= 0.9 * examples
    assert seen["examples with a recurrence"] >= 0.4 * examples, seen  # else the test says little
    if family != "bf16 and fp16":
        assert seen["gradients compared"] >= examples / 2, seen


@pytest.mark.slow
def test_kernels_keep_the_meaning():
    """Compiled: forward of the kernels bit for bit, gradients to rounding."""
    seen.clear()
    run(35, kernels=True, ops=EXACT_OPS, max_steps=40)
    assert seen["examples with a recurrence"] >= 8 and seen["gradients compared"] >= 10, seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--compiled", type=int, default=0, help="how many more, with generated C++ kernels")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shrink", action="store_true", help="make a failing program small (minutes)")
    given = parser.parse_args()
    if not given.shrink:
        SETTINGS["phases"] = [hypothesis.Phase.generate]
    start = time.perf_counter()
    run(given.examples, given.seed, ops=ALL_OPS, max_steps=300)
    if given.compiled:
        run(given.compiled, given.seed, kernels=True, ops=EXACT_OPS)
    print(f"seed {given.seed}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s, no failure")
    for what, count in seen.most_common():
        print(f"{count:7} {what}")


if __name__ == "__main__":
    main()
