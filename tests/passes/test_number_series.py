"""A Python number that changes from step to step is read from a series, with eager's bits."""

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from snn_compile.config import Config
from snn_compile.passes.number_series import number_series
from snn_compile.pipeline import run_pipeline
from tests.passes.capture import Spike, capture, reroll_all, rerolled, x


def compiled(function, *inputs, **options):
    """The report; values and gradients are compared with those of the graph before."""
    captured = capture(function, *inputs)
    _, report = captured.check(lambda gm: run_pipeline(gm, Config(strict=True, **options)))
    return report


def discounted(a):
    total = torch.zeros_like(a[0])
    for t in range(len(a)):
        total = total + a[t] * 0.9**t
    return total


def running_mean(a):
    mean = torch.zeros_like(a[0])
    for t in range(len(a)):
        mean = mean + (a[t] - mean) / (t + 1)
    return mean


def faster_decay(a):
    v, out = torch.zeros_like(a[0]), []
    for t in range(len(a)):
        v = v * 0.9**t + a[t]
        out.append(v)
    return torch.stack(out)


def first_spike(a):
    v, first = torch.zeros_like(a[0]), torch.full_like(a[0], len(a))
    for t in range(len(a)):
        v = 0.5 * v + a[t]
        s = v > 1.0
        first = torch.where(s & (first == len(a)), t, first)
        v = torch.where(s, 0.0, v)
    return first


def first_spike_in_integers(a):
    v, first = torch.zeros_like(a[0]), torch.full(a.shape[1:], -1)
    for t in range(len(a)):
        v = 0.5 * v + a[t]
        first = torch.where((v > 1.0) & (first < 0), t, first)
    return first


def learning_window(a):
    v, total = torch.zeros_like(a[0]), 0.0
    for t in range(len(a)):
        v = 0.5 * v + a[t]
        s = Spike.apply(v - 1.0)
        v = v - s
        total = total + math.exp(-t / 5.0) * s
    return total


def moving_threshold(a):
    v, out = torch.zeros_like(a[0]), []
    for t in range(len(a)):
        v = 0.9 * v + a[t]
        s = Spike.apply(v - 0.1 * t)
        v = torch.where(v > 0.1 * t, 0.0, v)
        out.append(s)
    return torch.stack(out)


def one_number_in_two_places(a):
    v, u = torch.zeros_like(a[0]), torch.zeros_like(a[0])
    for t in range(len(a)):
        v = v * 0.9**t + a[t]
        u = u + v * 0.9**t
    return u


def methods(a):
    v = torch.zeros_like(a[0])
    for t in range(len(a)):
        v = v.mul(0.9**t).add(a[t]).sub(0.1 * t).div(t + 1)
    return v


def backwards(a):
    total = torch.zeros_like(a[0])
    for t in reversed(range(len(a))):
        total = total * 0.5 + a[t] * t
    return total


LOOPS = {
    f.__name__: f
    for f in (
        discounted,
        running_mean,
        faster_decay,
        first_spike,
        first_spike_in_integers,
        learning_window,
        moving_threshold,
        one_number_in_two_places,
        methods,
        backwards,
    )
}


@pytest.mark.parametrize("name", LOOPS)
def test_loop(name):
    (loop,) = (loop for _, loop in rerolled(LOOPS[name], x()).loops() if loop.length >= 5)
    assert any(spec.example.shape == (1, 1) and not spec.example.requires_grad for spec in loop.xs)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_kernel(name, dtype):
    report = compiled(LOOPS[name], x(7, 33).detach().to(dtype).requires_grad_(dtype.itemsize > 2))
    assert len(report.recurrences) == 1


def test_one_series_for_equal_numbers():
    ((_, loop),) = rerolled(one_number_in_two_places, x()).loops()
    assert len(loop.xs) == 2


def test_sizes_of_one_lane_and_of_no_dims():
    assert compiled(discounted, torch.randn(9)).recurrences
    assert compiled(discounted, torch.randn(5, 1)).recurrences
    assert compiled(discounted, torch.randn(5, 2, 3, 4, 5)).recurrences


# --------------------------------------------------------------------------------------------------------------- exactness

OPS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "from the left": lambda a, n: n + a * 1,
    "less": lambda a, n: n - a,
    "times": lambda a, n: n * a,
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
    "ne": operator.ne,
    "where": lambda a, n: torch.where(a > 0, n, a),
    "else": lambda a, n: torch.where(a > 0, a, n),
}
REAL = [0.1 * 3**t for t in range(-6, 6)]
WHOLE = [t * t - 9 for t in range(12)]
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("numbers", [REAL, WHOLE], ids=["real", "whole"])
def test_every_op_has_eagers_bits_and_dtype(dtype, numbers):
    # (bools have no subtraction)
    ops = {name: op for name, op in OPS.items() if dtype is not torch.bool or name not in ("sub", "less")}

    def function(a):
        count, outs = a[0] * 0.0, {name: [] for name in ops}
        for t in range(len(a)):
            count = count + a[t]
            for name, op in ops.items():
                outs[name].append(op(a[t], numbers[t]))
        return (count, *(torch.stack(out) for out in outs.values()))

    values = torch.randn(12, 257) * 20
    values[:, :12] = torch.tensor(numbers)  # so that some are equal
    captured = capture(function, values.to(dtype))
    before = captured.run()[0]
    loops, _ = reroll_all(captured.gm)
    assert len(loops) == 1 and loops[0].length == 12
    for stage in (lambda gm: None, lambda gm: run_pipeline(gm, Config(strict=True))):
        stage(captured.gm)
        after = captured.run()[0]
        for name, a, b in zip(["count", *ops], before, after, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True, msg=name)


# ------------------------------------------------------------------------------------------------------ with other passes


def layer_between(a, w):
    v, out = torch.zeros(a.shape[1], w.shape[0]), []
    for t in range(len(a)):
        v = 0.5 * v + F.linear(a[t] * 0.9**t, w) * (t + 1)
        out.append(v)
    return torch.stack(out)


def recurrent(a, w):
    v = torch.zeros_like(a[0])
    for t in range(len(a)):
        v = torch.tanh(F.linear(v, w)) * 0.9**t + a[t]
    return v


def test_layers_are_batched_over_time():
    captured = capture(layer_between, x(), torch.randn(4, 5))
    _, report = captured.check(lambda gm: run_pipeline(gm, Config(strict=True)), rtol=1e-5)
    assert len(report.recurrences) == 1 and captured.targets().count(F.linear) == 1


def test_a_recurrence_with_calls():
    captured = capture(recurrent, x(), torch.randn(5, 5) * 0.3)
    _, report = captured.check(lambda gm: run_pipeline(gm, Config(strict=True, step_from=2)), rtol=1e-6)
    assert len(report.stepped) == 1


def test_two_of_them_over_one_series_are_fused():
    counters.clear()
    assert len(compiled(lambda a: (discounted(a), running_mean(a)), x()).recurrences) == 1
    assert counters["snn_compile"]["recurrences_fused"] == 1


def test_compiled():
    a = x(9, 3, 5)
    fast = torch.compile(learning_window, backend="snn", options={"strict": True})
    assert torch.equal(fast(a), learning_window(a))
    gradients = [torch.autograd.grad(f(a).square().sum(), a) for f in (fast, learning_window)]
    torch.testing.assert_close(*gradients)


# ------------------------------------------------------------------------------------------------------------ near misses


def each(op):
    def function(a):
        v = torch.ones_like(a[0])
        for t in range(len(a)):
            v = op(0.5 * v, a[t], t)
        return v

    return function


NEAR_MISSES = {
    "alpha": each(lambda v, a, t: torch.add(v, a, alpha=t + 1)),
    "an exponent": each(lambda v, a, t: v * 0.5 + a**t),
    "over the tensor": each(lambda v, a, t: a + (t + 1.0) / v),
    "a bound": each(lambda v, a, t: torch.clamp(v + a, max=0.1 * t)),
    "a rounding mode": each(lambda v, a, t: a + torch.div(v, t + 1, rounding_mode="floor")),
    "too large": each(lambda v, a, t: a + v * (1e38 * 10**t)),
    "too large for one rounding": each(lambda v, a, t: a + v * (2**60 + t)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name):
    captured = capture(NEAR_MISSES[name], x())
    loops, rejections = captured.check(reroll_all)
    assert not loops
    assert any("number changes" in r.reason for r in rejections)


def test_near_miss_layers_that_are_no_loop_over_time():
    def function(a):
        for i in range(6):
            a = torch.tanh(a) * 0.9**i
        return a

    loops, rejections = capture(function, x()).check(reroll_all)
    assert not loops and any("reads no time series" in r.reason for r in rejections)


def test_a_loop_whose_numbers_repeat_keeps_its_shape():
    """Two populations in a step are not twice as many steps of one."""

    def function(a):
        states = [torch.zeros_like(a[0]), torch.zeros_like(a[0])]
        for t in range(len(a)):
            for i, decay in enumerate((0.5, 0.9)):
                states[i] = decay * states[i] + a[t]
        return tuple(states)

    ((_, loop),) = rerolled(function, x()).loops()
    assert loop.length == 6 and len(loop.xs) == 1


def test_near_miss_on_an_accelerator():
    """There, a quotient is a product with the reciprocal, and half precision beside a number is computed in another way."""
    graph = torch.fx.Graph()
    value = graph.placeholder("value")
    for op, dtype, fires in (
        (operator.truediv, torch.float32, False),
        (operator.mul, torch.float32, True),
        (operator.mul, torch.bfloat16, False),
    ):
        value.meta["example_value"] = torch.empty(3, dtype=dtype, device="meta")
        node = graph.call_function(op, (value, 2.0))
        if fires:
            assert number_series(node, (value, 2.0), 1, (2.0, 3.0)).dtype is dtype
        else:
            with pytest.raises(Exception, match="another way by 'meta'"):
                number_series(node, (value, 2.0), 1, (2.0, 3.0))


def starts_as_a_number(first_read):
    """A state that starts as 0.1, of which the first step reads what `first_read` says."""

    def f(a):
        b, out = 0.1, []
        for t in range(len(a)):
            b = first_read(a[t], b) + a[t]
            out.append(b)
        return torch.stack(out)

    return f


FIRST_READS = {
    "product": lambda a, b: b * (a + 1.0),
    "sum": lambda a, b: 0.25 * (a + b),
    "difference": lambda a, b: 0.25 * (b - a),
    "quotient": lambda a, b: a / b,
    "comparison": lambda a, b: torch.where(a > b, a, 0.5),
    "two of them": lambda a, b: 0.5 * ((b - a) + a * b),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", FIRST_READS)
def test_start(name, dtype):
    report = compiled(starts_as_a_number(FIRST_READS[name]), (torch.rand(7, 3, 5) + 0.05).to(dtype))
    assert len(report.recurrences) == 1 and report.recurrences[0].meta["steps"] == 7


@pytest.mark.parametrize(
    ("first_read", "dtype"),
    (
        (lambda a, b: b / (a + 1.0), torch.float32),  # a reciprocal and a product
        (lambda a, b: b * (a + 1.0), torch.bfloat16),  # in fp32, from a number that is not rounded
        (lambda a, b: torch.add(a, b, alpha=2), torch.float32),
    ),
    ids=("dividend", "product in bf16", "alpha"),
)
def test_near_miss_start(first_read, dtype):
    report = compiled(starts_as_a_number(first_read), (torch.rand(7, 3, 5) + 0.05).to(dtype))
    assert "cannot hold exactly" in str(report) and "full_like" in str(report)
