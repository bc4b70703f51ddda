"""What a user may do to the backend by mistake, or a machine to the user: a clear message or Inductor's own answer, never a wrong
number. Machines without a compiler, with a full disk or with four compilers at once are processes of their own."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import snn_compile
from snn_compile.backend import snn
from snn_compile.errors import OptionError
from snn_compile.lowering.cpp import compiler
from tests import zoo

pytestmark = [
    pytest.mark.skipif(compiler.missing() is not None, reason="no C++ compiler"),
    pytest.mark.usefixtures("fresh"),
]


lif = zoo.lif


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


# ---------------------------------------------------------------------------------------------------------- odd operands


def test_no_images(op_by_op):
    """A batch of none, through convolution, batch norm and neuron in every step."""
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.MaxPool2d(2)).eval()

    def f(x: Tensor) -> Tensor:
        return lif(torch.stack([net(step) for step in x]))

    x = torch.randn(4, 0, 2, 8, 8)
    with torch.no_grad():
        expected = f(x)
        assert same(torch.compile(f, backend=snn, options={"strict": True})(x), expected) and expected.shape[1] == 0


def test_misspelled_option_says_what_was_meant():
    with pytest.raises(Exception, match="'batch_tme'; did you mean 'batch_time'") as raised:
        torch.compile(lif, backend=snn, options={"batch_tme": False})(torch.randn(3, 4))
    assert isinstance(raised.value, OptionError) or "OptionError" in str(raised.value)


def test_an_internal_failure_leaves_the_graph_to_inductor_and_to_the_report(monkeypatch, caplog, tmp_path):
    def fail(*_):
        raise AssertionError("a pass is wrong")

    monkeypatch.setattr("snn_compile.backend.run_pipeline", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    x = torch.randn(4, 3)
    with caplog.at_level("ERROR", "snn_compile"):
        monkeypatch.setattr(logging.getLogger("snn_compile"), "propagate", True)
        assert torch.equal(torch.compile(lif, backend=snn)(x), lif(x))
    (graph,) = tmp_path.glob("snn_compile_graph_*.txt")
    assert str(graph) in caplog.text and "a pass is wrong" in caplog.text
    assert "torch.stack" in graph.read_text()
    assert str(snn_compile.explain(lif)(x)).startswith("snn_compile: an internal failure")
    with pytest.raises(Exception, match="a pass is wrong"):
        torch.compile(lambda x: lif(x), backend=snn, options={"strict": True})(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_special_values_are_those_of_eager(value):
    x = torch.randn(7, 3, 21)
    x[2, 1, 4], x[5, 0, :9] = value, value
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, got = lif(a), torch.compile(lif, backend=snn)(b)
    assert same(got, expected)
    expected.sum().backward()
    got.sum().backward()
    assert torch.equal(a.grad.isfinite(), b.grad.isfinite())
    torch.testing.assert_close(b.grad, a.grad, equal_nan=True)
    assert counters["snn_compile"]["recurrences_lowered"] == 1


@pytest.mark.parametrize("steps", [0, 1])
def test_no_steps_and_one_step(steps):
    def total(x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1:])
        for t in range(x.shape[0]):
            v = v * 0.5 + x[t]
        return v

    x = torch.randn(steps, 3, 5)
    assert same(torch.compile(total, backend=snn)(x), total(x))


@pytest.mark.parametrize("shape", [(5, 0, 4), (5, 1, 1), (5, 1)])
def test_empty_and_tiny(shape):
    x = torch.randn(shape)
    assert same(torch.compile(lif, backend=snn)(x), lif(x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integer_inputs(dtype):
    def count(x: Tensor) -> Tensor:
        v, out = torch.zeros(x.shape[1:]), []
        for t in range(x.shape[0]):
            v = 0.5 * v + x[t]
            s = (v > 1.0).to(x.dtype)
            v = v * (1.0 - s.float())
            out.append(s)
        return torch.stack(out)

    x = torch.randint(0, 2 if dtype == torch.bool else 4, (6, 5, 7)).to(dtype)
    assert same(torch.compile(count, backend=snn)(x), count(x))


def test_complex_is_refused_and_runs_through_inductor():
    def resonate(x: Tensor) -> Tensor:
        z, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            z = z * (0.9 + 0.1j) + x[t]
            out.append(z.real)
        return torch.stack(out)

    x = torch.randn(5, 4, dtype=torch.complex64)
    got = torch.compile(resonate, backend=snn)(x)
    torch.testing.assert_close(got, resonate(x))
    torch._dynamo.reset()
    assert "complex64" in str(snn_compile.explain(resonate)(x))


def test_code_for_another_process_holds_no_op_of_this_one():
    """`aot_compile` saves it so; where it is loaded, nobody compiles, and nobody would define the op."""
    x = torch.randn(5, 4)
    with torch._functorch.config.patch(strict_autograd_cache=True), pytest.warns(UserWarning, match="kept for other processes"):
        assert same(torch.compile(lif, backend=snn)(x), lif(x))
    assert not counters["snn_compile"]["recurrences_lowered"]


def test_states_of_shapes_that_do_not_fit_fail_as_in_eager():
    def mismatch(x: Tensor) -> Tensor:
        v = torch.zeros(4)
        for t in range(x.shape[0]):
            v = v * 0.5 + x[t]
        return v

    x = torch.randn(5, 3)
    with pytest.raises(RuntimeError, match="must match the size"):
        mismatch(x)
    with pytest.raises(RuntimeError, match=r"size|shape|broadcast"):
        torch.compile(mismatch, backend=snn)(x)


def test_branch_on_data_gives_eagers_numbers():
    def branch(x: Tensor) -> Tensor:
        v = torch.zeros_like(x[0])
        for t in range(x.shape[0]):
            v = v * 0.5 + x[t]
            if v.sum() > 0:
                v = v - 1.0
        return v

    x = torch.randn(5, 6)
    assert same(torch.compile(branch, backend=snn)(x), branch(x))


class Поверхность(torch.autograd.Function):
    """*/ #error "out of the comment" /* \\"""

    @staticmethod
    def forward(ctx, int, alpha):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(int)
        return (int >= 0).to(int.dtype)

    @staticmethod
    def backward(ctx, for_):  # type: ignore[no-untyped-def]
        (auto,) = ctx.saved_tensors
        return for_ / (1 + auto.abs()), None  # */ #error \


def test_hostile_names_and_source_text():
    def template(int: Tensor) -> Tensor:
        namespace, delete, float32 = torch.zeros_like(int[0]), [], 0.5
        for void in range(int.shape[0]):
            потенциал = namespace * float32 + int[void]
            operator = Поверхность.apply(потенциал - 1.0, "*/ #error\n#error \\")
            namespace = потенциал - operator
            delete.append(operator)
        return torch.stack(delete)

    x = torch.randn(6, 4, 9)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, got = template(a), torch.compile(template, backend=snn)(b)
    assert same(got, expected)
    expected.sum().backward()
    got.sum().backward()
    torch.testing.assert_close(b.grad, a.grad)
    assert counters["snn_compile"]["recurrences_lowered"] == 1


def test_threads_share_a_compiled_function():
    compiled = torch.compile(lif, backend=snn)
    inputs = [torch.randn(6, 3, n) for n in (5, 64, 1000)] * 4
    compiled(inputs[0])

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = compiled(x)
        y.sum().backward()
        assert x.grad is not None
        return y.detach(), x.grad

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, inputs))
    for x, (y, grad) in zip(inputs, results, strict=True):
        x = x.clone().requires_grad_()
        expected = lif(x)
        expected.sum().backward()
        assert same(y, expected)
        torch.testing.assert_close(grad, x.grad)


# -------------------------------------------------------------------------------------------------- processes and machines

SCRIPT = """
    import torch
    from torch._dynamo.utils import counters
    from snn_compile.backend import snn

    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x >= 0).to(x.dtype)
        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad / (1 + (SLOPE * x) ** 2)

    def lif(x):
        v, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            h = v + (x[t] - v) / 2.0
            s = Spike.apply(h - 1.0)
            v = h * (1.0 - s)
            out.append(s)
        return torch.stack(out)

    x = torch.linspace(-3.0, 4.0, 6 * 40).reshape(6, 40)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, got = lif(a), torch.compile(lif, backend=snn)(b)
    assert torch.equal(got, expected)
    expected.sum().backward()
    got.sum().backward()
    torch.testing.assert_close(b.grad, a.grad)
    found, inductor = counters["snn_compile"], counters["inductor"]
    print("recurrences", found["recurrences_lowered"], "misses", inductor["fxgraph_cache_miss"])
"""


def start(cache: Path, slope: str = "3", shell: str = "", **environment: str) -> subprocess.Popen[str]:
    """The script in a process of its own, with its own cache directory; `shell` runs before it."""
    cache.mkdir(exist_ok=True)
    script = cache.parent / f"slope{slope}.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("SLOPE", slope))
    path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        ["sh", "-c", f'{shell}\nexec "$0" "$1"', sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **path, **environment},
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=500)
    return out.strip(), err


@pytest.mark.slow
def test_processes_compile_one_model_at_once(tmp_path):
    processes = [start(tmp_path / "cache") for _ in range(3)]
    for out, err in map(finish, processes):
        assert out.startswith("recurrences 1"), err[-2000:]
    out, err = finish(start(tmp_path / "cache"))
    assert out == "recurrences 1 misses 0", err[-2000:]  # all that they compiled is there for the next


@pytest.mark.slow
def test_another_formula_under_the_same_name_is_not_taken_from_the_cache(tmp_path):
    """The script checks its gradient against eager; only the second process finds the first one's entries."""
    cache = tmp_path / "cache"
    assert finish(start(cache, "3"))[0] == "recurrences 1 misses 2"
    out, err = finish(start(cache, "5"))
    assert out == "recurrences 1 misses 2", err[-2000:]
    assert finish(start(cache, "5"))[0] == "recurrences 1 misses 0"


@pytest.mark.slow
def test_without_a_compiler_one_warning_says_so_and_inductor_answers(tmp_path):
    out, err = finish(start(tmp_path / "cache", CXX="/nonexistent"))
    assert out == "" and "InvalidCxxCompiler" in err  # Inductor has no kernels on a CPU without one
    assert err.count("snn_compile: no working C++ compiler was found (set CXX, or install g++ or clang++)") == 1


@pytest.mark.slow
def test_a_full_disk_is_an_error_in_words_and_no_number(tmp_path):
    """No file may be longer than 10 kB: what a full disk or a quota does to a cache directory."""
    out, err = finish(start(tmp_path / "cache", shell="ulimit -f 20"))
    assert out == ""
    assert f"the cache directory {tmp_path / 'cache'} cannot be written: File too large" in err
