"""The text of kernels: two goldens, nothing unused, nothing of the user's that could become code."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import replace

import expecttest
import pytest
import torch

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.layout import Layout
from snn_compile.lowering.triton.codegen import generate
from snn_compile.lowering.triton.load import load_module
from snn_compile.lowering.triton.names import Names, comment, identifier
from tests.lowering.triton.cases import CASES, recurrence

HOSTILE = (
    "x): import os\n    os.system('true')\n#",
    "'''\nraise SystemExit",
    "lambda",
    "match",
    "tl",
    "T",
    "range",
    "__import__",
    "μ; N = 0",
    "a\u2028b\rc\x0cd\u202ee",
    "",
    "9lives",
    "x" * 500,
)


def named_lif() -> Recurrence:
    """A LIF with the names that its variables have in the user's code."""
    case = replace(CASES["lif"], carries=(replace(CASES["lif"].carries[0], init_needs_grad=False),))
    rec = recurrence(case)
    rec.equations = ("h = v + (x - v) / 2.0", "s = Heaviside(h - 1)", "v = h * (1 - s)")
    assert rec.backward is not None
    for graph in (rec.step.graph, rec.backward.graph):
        for node in graph.nodes:
            name = {"add": "h", "_to_copy": "s"}.get(node.name)
            if name:
                node.meta["user_name"] = name
    return rec


class Goldens(expecttest.TestCase):
    maxDiff = None

    def test_forward(self) -> None:
        self.assertExpectedInline(
            generate(named_lif(), "forward", Layout(1, (1,) * 4)).source,
            """\
import triton
import triton.language as tl


# lif, forward
# h = v + (x - v) / 2.0
# s = Heaviside(h - 1)
# v = h * (1 - s)
@triton.jit
def lif_forward(
    v_init_ptr,
    x_ptr,
    s_ptr,
    v_final_ptr,
    T,
    N: tl.int64,
    x_stride_t: tl.int64,
    s_stride_t: tl.int64,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    lane = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < N
    v = tl.load(v_init_ptr + lane, mask=inside)
    for t in range(T):
        x = tl.load(x_ptr + t * x_stride_t + lane, mask=inside)
        h = v + (x - v) * 0.5
        s = (h - 1.0 >= 0.0).to(tl.float32)
        tl.store(s_ptr + t * s_stride_t + lane, s, mask=inside)
        v = h * (1.0 - s)
    tl.store(v_final_ptr + lane, v, mask=inside)
""",
        )

    def test_backward(self) -> None:
        self.assertExpectedInline(
            generate(named_lif(), "backward", Layout(1, (1,) * 5)).source,
            """\
import triton
import triton.language as tl
from triton.language.extra import libdevice


# lif, backward
# h = v + (x - v) / 2.0
# s = Heaviside(h - 1)
# v = h * (1 - s)
@triton.jit
def lif_backward(
    v_init_ptr,
    x_ptr,
    grad_s_ptr,
    grad_v_final_ptr,
    grad_x_ptr,
    v_start_ptr,
    T,
    N: tl.int64,
    x_stride_t: tl.int64,
    grad_s_stride_t: tl.int64,
    grad_x_stride_t: tl.int64,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    lane = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < N
    grad_v = tl.load(grad_v_final_ptr + lane, mask=inside)
    # the states at the start of every segment
    v = tl.load(v_init_ptr + lane, mask=inside)
    segments = tl.cdiv(T, SEGMENT)
    for segment in range(segments - 1):
        tl.store(v_start_ptr + segment * N + lane, v, mask=inside)
        for k in tl.static_range(SEGMENT):
            t = segment * SEGMENT + k
            x = tl.load(x_ptr + t * x_stride_t + lane, mask=inside)
            h = v + (x - v) * 0.5
            s = (h - 1.0 >= 0.0).to(tl.float32)
            v = h * (1.0 - s)
    tl.debug_barrier()  # all starts are stored before one is loaded
    for segment in range(segments - 1, -1, -1):
        # the states of this segment
        v_steps = ()
        x_steps = ()
        grad_s_steps = ()
        for k in tl.static_range(SEGMENT):
            t = segment * SEGMENT + k
            live = inside & (t < T)
            x = tl.load(x_ptr + t * x_stride_t + lane, mask=live)
            grad_s = tl.load(grad_s_ptr + t * grad_s_stride_t + lane, mask=live)
            v_steps = v_steps + (v,)
            x_steps = x_steps + (x,)
            grad_s_steps = grad_s_steps + (grad_s,)
            h = v + (x - v) * 0.5
            s = (h - 1.0 >= 0.0).to(tl.float32)
            v = h * (1.0 - s)
        # and back over them
        for k in tl.static_range(SEGMENT - 1, -1, -1):
            t = segment * SEGMENT + k
            live = inside & (t < T)
            v = v_steps[k]
            x = x_steps[k]
            grad_s = grad_s_steps[k]
            h = v + (x - v) * 0.5
            sub = h - 1.0
            s = (sub >= 0.0).to(tl.float32)
            sigmoid = tl.div_rn(1.0, 1.0 + libdevice.exp(-(sub * 4.0)))
            mul = (grad_s + grad_v * h * -1.0) * (1.0 - sigmoid)
            add = grad_v * (1.0 - s) + mul * sigmoid * 4.0
            div = add * 0.5
            tl.store(grad_x_ptr + t * grad_x_stride_t + lane, div, mask=live)
            grad_v = tl.where(t < T, add + div * -1.0, grad_v)
        v = tl.load(v_start_ptr + (segment - 1) * N + lane, mask=inside & (segment > 0))
""",
        )


def kernels() -> Iterator[tuple[str, str]]:
    """Kernels of all cases in several layouts and dtypes."""
    for name, case in CASES.items():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            rec = recurrence(case, dtype)
            for direction in ("forward", "backward"):
                for ndim, inner in ((1, 1), (1, 0), (2, -1), (3, 1)):
                    text = generate(rec, direction, Layout(ndim, (inner,) * 12))
                    yield f"{name} {dtype} {direction} {ndim} {inner}", text.source


def test_everything_is_used():
    """Arguments, variables, imports, helpers."""
    for what, source in kernels():
        tree = ast.parse(source)
        loaded = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
        stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        stored |= {a.arg for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) for a in n.args.args}
        stored |= {a.asname or a.name for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        stored |= {n.name for n in tree.body[:-1] if isinstance(n, ast.FunctionDef)}
        loops = {n.target.id for n in ast.walk(tree) if isinstance(n, ast.For) and isinstance(n.target, ast.Name)}
        assert stored - set(loaded) - {"triton.language"} <= loops, f"{what}\n{source}"


def test_text_is_deterministic_and_short():
    for (what, source), (_, again) in zip(kernels(), kernels(), strict=True):
        assert source == again, what
        assert max(map(len, source.splitlines())) <= 160, source


@pytest.mark.parametrize("text", HOSTILE)
def test_user_text_stays_what_it_is(text):
    name = identifier(text)
    assert name.isidentifier() and name.isascii() and len(name) < 80
    assert len(comment(text).splitlines()) == 1 and comment(text).startswith("#")
    rec = named_lif()
    rec.name, rec.equations = text, (text, f"#{text}")
    rec.carries = tuple(replace(c, name=text) for c in rec.carries)
    rec.xs = tuple(replace(x, name=text) for x in rec.xs)
    rec.ys = tuple(replace(y, name=text) for y in rec.ys)
    assert rec.backward is not None
    for graph in (rec.step.graph, rec.backward.graph):
        for node in graph.nodes:
            node.meta["user_name"] = text
    for direction, tensors in (("forward", 4), ("backward", 5)):
        hostile = ast.parse(generate(rec, direction, Layout(1, (1,) * tensors)).source)
        plain = ast.parse(generate(named_lif(), direction, Layout(1, (1,) * tensors)).source)
        assert _calls(hostile) == _calls(plain)
        assert len(hostile.body) == len(plain.body)


def _calls(tree: ast.AST) -> list[str]:
    functions = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return sorted(f.attr if isinstance(f, ast.Attribute) else ast.unparse(f) for f in functions)


@pytest.mark.parametrize("error", [PermissionError, AttributeError, OSError(28, "no space left")])
def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, error):
    pytest.importorskip("triton")

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("torch._inductor.codecache.PyCodeCache.load", fail)
    source = generate(named_lif(), "forward", Layout(1, (1,) * 4)).source
    function = load_module(source).lif_forward
    assert "def lif_forward(" in inspect.getsource(function.fn)


def test_names_are_unique():
    names = Names()
    assert [names.unique("v") for _ in range(3)] == ["v", "v_1", "v_2"]
    assert names.unique("T") == "T_1"


def test_unknown_layout_of_a_scalar_takes_no_strides():
    """A 0-d constant is one load, whatever the layout."""
    source = generate(recurrence(CASES["parametric"]), "forward", Layout(2, (1, 1, 0, 0, 1, 1))).source
    assert "tau = tl.load(tau_ptr)\n" in source and "tau_stride" not in source
