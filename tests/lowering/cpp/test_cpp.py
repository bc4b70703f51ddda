"""The C++ kernels against `Recurrence.__call__` (forward, bit for bit) and autograd of the eager loop (gradients)."""

from __future__ import annotations

import concurrent.futures
import ctypes
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from snn_compile.ir.recurrence import Carry, Const, Output, Recurrence, TimeSeries
from snn_compile.lowering import launch
from snn_compile.lowering.cpp import compiler, plan, target
from snn_compile.lowering.cpp.names import comment, identifier
from snn_compile.lowering.cpp.prelude import prelude
from snn_compile.lowering.layout import Layout
from snn_compile.lowering.ops import is_supported
from snn_compile.passes.trace_step import trace_step
from tests import zoo

TARGET = target.CppTarget()
F32 = torch.float32


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (u,) = ctx.saved_tensors
        s = torch.sigmoid(4.0 * u)
        return grad * (1 - s) * s * 4.0


@dataclass(frozen=True)
class Case:
    body: Callable[..., Sequence[Tensor]]
    carries: tuple[Carry, ...]
    xs: tuple[TimeSeries, ...]
    consts: tuple[Const, ...] = ()
    ys: tuple[Output, ...] = (Output("s", F32),)

    def traced(self, dtype: torch.dtype = F32, **meta: object) -> Recurrence:
        def cast(o):  # type: ignore[no-untyped-def]
            return replace(o, dtype=dtype) if o.dtype == F32 else o

        carries, xs, consts = ([cast(o) for o in group] for group in (self.carries, self.xs, self.consts))
        recurrence = trace_step(
            self.body,
            name=self.body.__name__,
            carries=carries,
            xs=xs,
            consts=consts,
            ys=self.ys,
            shape=(3, 5),
            supported=is_supported,
        )
        return replace(recurrence, **meta)


def state(name: str, dtype: torch.dtype = F32, grad: bool = True) -> Carry:
    return Carry(name, dtype, init_needs_grad=grad and dtype.is_floating_point, is_result=True)


def lif(v, x):
    h = v + (x - v) / 2.0
    s = Spike.apply(h - 1.0)
    return h * (1 - s), s


def plif(v, x, w, threshold, rate):
    """A learnable number or one a channel in every place; `rate` wants no gradient."""
    h = v + (x - v) * torch.sigmoid(w) * torch.sigmoid(-rate)
    s = Spike.apply(h - threshold)
    return h - s * threshold, s, h


def two_states(i, v, x):
    current = i * 0.9 + x
    h = v * 0.8 + current
    s = Spike.apply(h - 1.0)
    return current, h - s, s


def detached(v, x):
    h = v * 0.5 + x
    s = Spike.apply(h - 1.0)
    return h * (1 - s.detach()), s


def refractory(v, count, fired, x):
    """An integer and a bool state; the float path stops where they say so."""
    h = torch.where(count > 0, v, v + (x - v) / 2.0)
    s = Spike.apply(h - 0.6)
    fires = s > 0
    count = torch.where(fires, 2, count - 1).clamp(min=0)
    return h * (1 - s), count, fires & ~fired, s


def leaky(v, x, decay):
    """Linear: no state is read by the gradient of x, v is by that of `decay`."""
    v = v * decay + x
    return v, v


def integrator(v, x):
    """The gradient reads no state at all: nothing to replay."""
    v = v * 0.9 + torch.sigmoid(x)
    return v, v


def delayed(v, before, x, scale):
    """Carries that are swapped; a dimensionless constant, an output that is an input of the step."""
    v = v * 0.5 + before * scale + x
    return v, x, before


def rectified(v, x):
    """A rectifier before the spike: the backward selects, with the surrogate's exponential on one side."""
    h = torch.relu(v + (x - v) / 2.0)
    s = zoo.Sigmoid.apply(h - 1.0, 4.0)
    v = torch.where(s > 0, 0.0, h)
    return v, s


X = TimeSeries("x", F32, needs_grad=True)
CASES = {
    c.body.__name__: c
    for c in (
        Case(lif, (state("v"),), (X,)),
        Case(
            plif,
            (state("v"),),
            (X,),
            (Const("w", F32, True), Const("threshold", F32, True), Const("rate", F32)),
            (Output("s", F32), Output("h", F32)),
        ),
        Case(two_states, (state("i"), state("v", grad=False)), (X,)),
        Case(detached, (state("v"),), (X,)),
        Case(rectified, (state("v"),), (X,)),
        Case(refractory, (state("v"), state("count", torch.int64), state("fired", torch.bool)), (X,)),
        Case(leaky, (state("v"),), (X,), (Const("decay", F32, True),)),
        Case(integrator, (state("v"),), (X,)),
        Case(delayed, (state("v"), state("before")), (X,), (Const("scale", F32, is_scalar=True),)),
    )
}


# ------------------------------------------------------------------------------------------------------------- helpers


def operand(spec: Carry | TimeSeries | Const, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if spec.dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if not spec.dtype.is_floating_point:
        return torch.randint(0, 3, shape, generator=generator)
    spread = 2.0 if isinstance(spec, TimeSeries) else 0.3
    return (torch.randn(shape, generator=generator) * spread + 0.5).to(spec.dtype)


Shape = tuple[int, ...]


def operands_of(r: Recurrence, steps: int, shape: Shape, consts: Sequence[Shape] = ()) -> list[Tensor]:
    shapes = [shape] * len(r.carries) + [(steps, *shape)] * len(r.xs)
    shapes += [() if c.is_scalar else s for c, s in zip(r.consts, consts or [()] * len(r.consts), strict=True)]
    return [operand(s, size, i) for i, (s, size) in enumerate(zip((*r.carries, *r.xs, *r.consts), shapes, strict=True))]


def eager_gradients(body, r: Recurrence, operands, cotangents, steps: int) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Autograd through the loop itself."""
    wants = [*(c.init_needs_grad for c in r.carries), *(o.needs_grad for o in (*r.xs, *r.consts))]
    leaves = [o.detach().clone().requires_grad_() if w else o for o, w in zip(operands, wants, strict=True)]
    shape = r.shape(operands)
    n = len(r.carries)
    carries = [i.expand(shape) for i in leaves[:n]]
    xs, consts = leaves[n : n + len(r.xs)], leaves[n + len(r.xs) :]
    outputs: list[list[Tensor]] = [[] for _ in r.ys]
    for t in range(steps):
        out = body(*carries, *(x[steps - 1 - t if s.reverse else t] for x, s in zip(xs, r.xs, strict=True)), *consts)
        carries = out[:n]
        for values, value in zip(outputs, out[n:], strict=True):
            values.append(value)
    ys = [torch.stack(v[::-1] if s.reverse else v, s.time_dim) for v, s in zip(outputs, r.ys, strict=True)]
    results = [y for y, s in zip(ys, r.ys, strict=True) if s.differentiable]
    results += [v for v, s in zip(carries, r.carries, strict=True) if s.is_result and s.differentiable]
    pairs = [(y, c) for y, c in zip(results, cotangents, strict=True) if c is not None and y.requires_grad]
    wanted = [leaf for leaf, w in zip(leaves, wants, strict=True) if w]
    grads = torch.autograd.grad([y for y, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, wanted, strict=True)]


def as_eager_has_it(r: Recurrence, operands: list[Tensor]) -> list[Tensor]:
    """A parameter of several numbers goes through eager's vectorised loops, which it does not where strides are 0."""
    first = len(r.carries) + len(r.xs)
    shape = r.shape(operands)
    return [o.expand(shape).contiguous() if i >= first and o.numel() > 1 else o for i, o in enumerate(operands)]


def check(
    case: Case, r: Recurrence, operands: list[Tensor], steps: int, tolerance: float = 1e-5, no_cotangent: bool = False
) -> None:
    got = launch.run_forward(r, TARGET, operands, steps)
    expected = r(*(as_eager_has_it(r, operands)), steps=steps)
    for g, e, spec in zip(got, expected, (*r.ys, *r.finals), strict=True):
        assert torch.equal(g.nan_to_num(-7), e.nan_to_num(-7)), spec.name
    if r.backward is None or steps == 0:
        return
    differentiable = [y.differentiable for y in r.ys] + [c.differentiable for c in r.finals]
    cotangents = [
        None if no_cotangent and i == 0 else operand(TimeSeries("", e.dtype), tuple(e.shape), 50 + i)
        for i, (e, d) in enumerate(zip(expected, differentiable, strict=True))
        if d
    ]
    grads = launch.run_backward(r, TARGET, operands, cotangents, steps)
    reference = eager_gradients(case.body, r, operands, cotangents, steps)
    for g, e in zip(grads, reference, strict=True):
        g = g.sum_to_size(e.shape) if g.shape != e.shape else g
        torch.testing.assert_close(g.to(e.dtype), e, rtol=tolerance, atol=tolerance * float(e.abs().max() + 1e-6))


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", (1, 2, 7, 9))
def test_forward_and_gradients(name: str, steps: int) -> None:
    case = CASES[name]
    r = case.traced()
    # eager's sigmoid is another one in the lanes that fill no vector
    lanes = 1024 if name in ("integrator", "plif") else 1003
    check(case, r, operands_of(r, steps, (lanes,)), steps)


@pytest.mark.parametrize("steps", (0, 1, 8, 63, 300))
@pytest.mark.parametrize("lanes", (1, 3, 63, 1000, 4097))
def test_any_number_of_steps_and_lanes(steps: int, lanes: int) -> None:
    case = CASES["lif"]
    r = case.traced()
    check(case, r, operands_of(r, steps, (lanes,)), steps)


def test_a_kernel_refuses_another_dtype() -> None:
    r = CASES["lif"].traced()
    v, x = operands_of(r, 4, (5,))
    with pytest.raises(TypeError, match=r"'x' is torch\.bfloat16, and the kernel"):
        launch.run_forward(r, TARGET, [v, x.bfloat16()], 4)


def test_no_steps_give_the_initial_state_and_pass_its_gradient_through() -> None:
    r = CASES["lif"].traced()
    v, x = operands_of(r, 0, (5,))
    s, final = launch.run_forward(r, TARGET, [v, x], 0)
    assert s.shape == (0, 5) and torch.equal(final, v)
    ct = torch.randn(5)
    grad_v, grad_x = launch.run_backward(r, TARGET, [v, x], [torch.empty(0, 5), ct], 0)
    assert torch.equal(grad_v, ct) and grad_x.shape == (0, 5)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ("lif", "plif", "refractory"))
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    r = case.traced(dtype)
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    operands = operands_of(r, 5, (515,))
    if name == "plif":  # the cotangent of a broadcast parameter is summed in another order and precision than eager's
        r = replace(r, backward=None)
    check(case, r, operands, 5, tolerance)


SHAPES = (((), (), ()), ((4,), (), (6, 1, 1)), ((4,), (4,), (4,)), ((6, 8, 4), (8, 1), ()))


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_broadcast_parameters(shapes: tuple[Shape, ...]) -> None:
    case = CASES["plif"]
    r = case.traced()
    check(case, r, operands_of(r, 6, (6, 8, 4), shapes), 6, 1e-4)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x.new_full(x.shape, float("nan"))], -1)[..., 0]


def misaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS = {
    "transposed": lambda v, x: (v, x.transpose(-1, -2).contiguous().transpose(-1, -2)),
    "all transposed": lambda v, x: tuple(a.transpose(-1, -2).contiguous().transpose(-1, -2) for a in (v, x)),
    "time inside": lambda v, x: (v, x.movedim(0, 2).contiguous().movedim(2, 0)),
    "time last": lambda v, x: (v, x.movedim(0, -1).contiguous().movedim(-1, 0)),
    "strided": lambda v, x: (strided(v), x),
    "strided in time": lambda v, x: (v, torch.stack([x, x * float("nan")], 1)[:, 0]),
    "rows with gaps": lambda v, x: (v, torch.cat([x, x * float("nan")], -1)[..., : x.shape[-1]]),
    "broadcast start": lambda v, x: (v[:1, :1, :1], x),
    "broadcast x": lambda v, x: (v, x[:, :, :, :1]),
    "one x for all steps": lambda v, x: (v, x[:1].expand(x.shape)),
    "misaligned": lambda v, x: (misaligned(v), misaligned(x)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    case = CASES["lif"]
    r = case.traced()
    v, x = operands_of(r, 5, (3, 7, 33))
    check(case, r, list(LAYOUTS[layout](v, x)), 5)


def test_channels_last_is_one_run_of_lanes() -> None:
    case = CASES["lif"]
    r = case.traced()
    v, x = operands_of(r, 4, (2, 3, 5, 6))
    v = v.contiguous(memory_format=torch.channels_last)
    x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    check(case, r, [v, x], 4)


@pytest.mark.parametrize("time_dim", (1, 2, -1))
def test_outputs_stacked_along_another_dim(time_dim: int) -> None:
    case = CASES["lif"]
    r = case.traced()
    r = replace(r, ys=tuple(replace(y, time_dim=time_dim) for y in r.ys))
    check(case, r, operands_of(r, 6, (4, 35)), 6)


@pytest.mark.parametrize("x_reversed", (False, True))
@pytest.mark.parametrize("y_reversed", (False, True))
def test_time_backwards(x_reversed: bool, y_reversed: bool) -> None:
    case = CASES["lif"]
    r = case.traced()
    xs = tuple(replace(x, reverse=x_reversed) for x in r.xs)
    ys = tuple(replace(y, reverse=y_reversed) for y in r.ys)
    check(case, replace(r, xs=xs, ys=ys), operands_of(r, 7, (100,)), 7)


@pytest.mark.parametrize("name", ("lif", "plif", "two_states", "refractory"))
@pytest.mark.parametrize("steps", (1, 12, 61))
def test_segments(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trajectory that does not fit the scratch is replayed from checkpoints."""
    monkeypatch.setattr(plan, "SCRATCH_BYTES", 1 << 14)
    monkeypatch.setattr(plan, "FEWEST_LANES", 4096)
    case = CASES[name]
    r = case.traced()
    source = target.generate(r, "backward", Layout(1, (1,) * 20))
    assert plan.plan(source, (4097,), steps, 2).segment <= max(steps // 2, 1)
    check(case, r, operands_of(r, steps, (4097,)), steps)


def test_a_missing_cotangent_is_zero() -> None:
    case = CASES["lif"]
    r = case.traced()
    check(case, r, operands_of(r, 6, (70,)), 6, no_cotangent=True)


@pytest.mark.parametrize("size", (1 << 19, (1 << 19) + 3))
def test_large_results_are_streamed(size: int) -> None:
    case = CASES["lif"]
    r = case.traced()
    operands = operands_of(r, 3, (size,))
    assert plan.is_streamed(3 * operands[0].nbytes, operands[0].nbytes)
    check(case, r, operands, 3)
    check(case, r, [misaligned(o) for o in operands], 3)


@pytest.mark.parametrize(("lanes", "streamed"), ((16, False), (32, True), (49, False), (64, True), (196, False), (300, True)))
def test_short_rows_are_streamed_where_they_are_whole_cache_lines(lanes: int, streamed: bool) -> None:
    case = CASES["lif"]
    r = case.traced()
    rows = (1 << 19) // lanes
    assert plan.is_streamed(3 * rows * lanes * 4, lanes * 4) is streamed
    check(case, r, [o[..., :lanes] for o in operands_of(r, 3, (rows, lanes + 5))], 3)  # gaps: the rows stay rows


def test_nan_and_infinity_are_those_of_eager() -> None:
    case = CASES["lif"]
    r = case.traced()
    v, x = operands_of(r, 6, (40,))
    x[2, 3], x[1, 4], x[0, 5], x[3, 6] = float("nan"), float("inf"), -float("inf"), 1e38
    got, expected = launch.run_forward(r, TARGET, [v, x], 6), r(v, x, steps=6)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=0, equal_nan=True)


def test_new_sizes_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    r = CASES["lif"].traced()
    launch.run_forward(r, TARGET, operands_of(r, 3, (100,)), 3)
    monkeypatch.setattr(compiler, "load", lambda text: pytest.fail("compiled again"))
    for steps, lanes in ((4, 100), (3, 5000), (90, 17)):
        launch.run_forward(r, TARGET, operands_of(r, steps, (lanes,)), steps)


def test_threads_share_a_kernel() -> None:
    case = CASES["lif"]
    r = case.traced()
    fresh = target.CppTarget()
    operands = operands_of(r, 9, (3000,))
    expected = r(*operands, steps=9)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        runs = [pool.submit(launch.run_forward, r, fresh, operands, 9) for _ in range(24)]
        for run in runs:
            assert all(torch.equal(g, e) for g, e in zip(run.result(), expected, strict=True))


# -------------------------------------------------------------------------------------------------- text of the kernels


def test_only_what_is_used_is_in_the_text() -> None:
    r = CASES["integrator"].traced()
    text = TARGET.source(r, "backward", Layout(1, (1,) * 7))
    for absent in ("scratch", "segment", "v_init,", "v_lanes[", "vtanh", "round_", "checkpoint"):
        assert not re.search(rf"(?<!_){re.escape(absent)}", text), absent
    for name in re.findall(r"const \w+ (\w+) =", text):
        assert len(re.findall(rf"\b{name}\b", text)) > 1, f"{name} is computed and not used"


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", ["lif", "two_states", "detached", "rectified"])
def test_no_branch_keeps_a_loop_from_being_vectorised(name: str, direction: launch.Direction, tmp_path: Path) -> None:
    from torch._inductor import cpp_builder

    if not compiler._is_gcc(cpp_builder):
        pytest.skip("reads the notes of gcc")
    r = CASES[name].traced()
    tensors = 20  # at least as many as any of these kernels has
    source = tmp_path / "kernel.cpp"
    source.write_text(TARGET.source(r, direction, Layout(1, (1,) * tensors)))
    command = [cpp_builder.get_cpp_compiler(), "-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC"]
    command += [*compiler.flags(), "-fopt-info-vec-missed", str(source), "-o", str(tmp_path / "kernel.so")]
    notes = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    branching = {int(n) for n in re.findall(r"kernel\.cpp:(\d+):\d+: missed: not vectorized: control flow in loop", notes)}
    lines = source.read_text().splitlines()
    lanes = {i + n for i, line in enumerate(lines) if "for (int64_t lane" in line for n in (1, 2)}  # (or its first statement)
    assert "missed" in notes and lanes and not lanes & branching


def test_invariants_leave_the_loop() -> None:
    r = CASES["plif"].traced()
    numbers = TARGET.source(r, "forward", Layout(1, (1, 1, 0, 0, 0, 1, 1, 1)))
    assert numbers.index("sigmoid_of_one(w)") < numbers.index("for (int64_t thread")
    rows = TARGET.source(r, "forward", Layout(1, (1, 1, 1, 0, 1, 1, 1, 1)))
    assert rows.index("for (int64_t block") < rows.index("sigmoid(w)") < rows.index("for (int64_t t ")


HOSTILE = ("int", "x_row", "v\n*/ evil", "a-b", "1st", "день", "steps", "vexp", "??/", "__x", "x" * 99, "lane")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_identifiers(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", identifier(name))


@pytest.mark.parametrize("text", ("*/ int x;", "a\nint x;", "ends \\", "ends ??/", "\r\x0b\u2028int x;", "a\\\nint x;"))
def test_comments_stay_comments(text: str) -> None:
    line = comment(text)
    assert line.startswith("//") and len(line.splitlines()) == 1 and not line.endswith("\\") and "??" not in line


def test_hostile_names_compile_and_compute() -> None:
    case = CASES["two_states"]
    r = case.traced(equations=("h = 1 */ #error \\", "x\n#error"), location="a??/\n#error")
    nodes = [n for g in (r.step, r.backward) for n in g.graph.nodes if n.op == "call_function"]  # type: ignore[union-attr]
    for i, node in enumerate(nodes):
        node.meta["user_name"] = HOSTILE[i % len(HOSTILE)]
    carries = tuple(replace(c, name=n) for c, n in zip(r.carries, ("lane", "x_row"), strict=True))
    xs = tuple(replace(x, name="int") for x in r.xs)
    r = replace(r, name="for", carries=carries, xs=xs, ys=tuple(replace(y, name="x_row") for y in r.ys))
    check(case, r, operands_of(r, 4, (2, 20)), 4)


# ------------------------------------------------------------------------------------------------------ what is missing


def test_missing_compiler_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    assert TARGET.missing() is None

    def no_compiler() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    assert "no working C++ compiler" in str(TARGET.missing())


def test_unusable_cache_is_said_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(blocked / "below"))
    assert "cannot be written" in str(TARGET.missing())


EVERY_SEVENTH = """
#include <cstdint>
typedef float floats __attribute__((vector_size(32)));
extern "C" floats Sleef_expf8_u10(floats);
extern "C" int64_t different() {
  int64_t count = 0;
  float x[4096], y[4096];
  for (uint64_t first = 0; first < 1ull << 32; first += 7 * 4096) {
    for (uint64_t i = 0; i < 4096; ++i) x[i] = __builtin_bit_cast(float, uint32_t(first + 7 * i));
#pragma omp simd
    for (int64_t i = 0; i < 4096; ++i) y[i] = vexp(x[i]);
    for (int64_t i = 0; i < 4096; i += 8) {
      floats eight;
      for (int64_t j = 0; j < 8; ++j) eight[j] = x[i + j];
      eight = Sleef_expf8_u10(eight);
      for (int64_t j = 0; j < 8; ++j)
        count += __builtin_bit_cast(uint32_t, eight[j]) != __builtin_bit_cast(uint32_t, y[i + j]) && x[i + j] == x[i + j];
    }
  }
  return count;
}
"""


@pytest.mark.skipif(not hasattr(compiler.libtorch(), "Sleef_expf8_u10"), reason="libtorch_cpu does not hand out its Sleef")
def test_exp_has_eagers_bits() -> None:
    library = compiler.load("#include <cstdint>" + prelude(["vexp.float"]) + EVERY_SEVENTH)
    library.different.restype = ctypes.c_int64
    assert library.different() == 0
