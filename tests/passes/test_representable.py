"""What `passes/representable` leaves out must change nothing: all values of a dtype, rounded and not, and near misses."""

import operator

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from snn_compile.backend import snn
from snn_compile.passes.representable import is_representable, keeps_sign, whole

HALVES = (torch.bfloat16, torch.float16)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All 65536 of them: subnormals, infinities and NaNs included."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def traced(function, *dtypes: torch.dtype) -> list[fx.Node]:
    """The ops of the function of tensors of these dtypes; what it returns last has its result as a user."""
    gm = make_fx(function)(*(torch.ones(4, dtype=d) for d in dtypes))
    return [n for n in gm.graph.nodes if n.op == "call_function"]


def spike(u: torch.Tensor) -> torch.Tensor:
    return (u >= 0).to(u.dtype)


def of_a_spike(function):
    return lambda u, h: function(spike(u), h)


@pytest.mark.parametrize("dtype", HALVES)
def test_an_op_that_is_left_unrounded_gives_a_value_of_the_dtype(dtype):
    """Each such op computed in fp32 of rounded operands, over all values of one and a few of the other."""
    functions = {
        "1 - s": lambda s, h: 1 - s,
        "s*0": lambda s, h: s * 0.0,
        "s + s": lambda s, h: s + s,
        "(1 - s)*h": lambda s, h: (1 - s) * h,
        "s*0 + h": lambda s, h: s * 0.0 + h,
        "h - s*0": lambda s, h: h - s * 0.0,
        "s*0 - h": lambda s, h: s * 0.0 - h,
        "-1*h": lambda s, h: -1 * h,
        "h*(u > 0)": lambda s, h: h * (h > 0),
        "(1 - s - s)*h": lambda s, h: (1 - s - s) * h,
    }
    h = every_value(dtype)
    for text, function in functions.items():
        last = traced(of_a_spike(function), dtype, dtype)[-1]
        assert is_representable(last), text
        for u in (-1.0, 1.0):
            s = spike(torch.full_like(h, u))
            wide = function(s.float(), h.float())
            torch.testing.assert_close(wide.to(dtype).float(), wide, rtol=0, atol=0, equal_nan=True, msg=text)


@pytest.mark.parametrize("dtype", HALVES)
def test_near_misses_are_rounded(dtype):
    misses = {
        "h - 1": lambda s, h: h - 1.0,
        "h*h": lambda s, h: h * h,
        "h/2": lambda s, h: h / 2.0,
        "2*h": lambda s, h: 2.0 * h,  # (fp16 overflows)
        "s*0.3": lambda s, h: s * 0.3,
        "s + h": lambda s, h: s + h,
        "(1 - s + s + s)*h": lambda s, h: (1 - s + s + s) * h,
        "h + 0.3*0": lambda s, h: torch.add(h, s * 0.0, alpha=0.3),
        "(1 - s)*0.3": lambda s, h: (1 - s) * 0.3,  # (eager may round the number, or not)
    }
    for text, function in misses.items():
        last = traced(of_a_spike(function), dtype, dtype)[-1]
        assert not is_representable(last), text


def test_whole_numbers_have_bounds():
    def bounds(function):
        return whole(traced(lambda u: function(spike(u)), torch.bfloat16)[-1])

    assert bounds(lambda s: s) == (0, 1)
    assert bounds(lambda s: 1 - s) == (0, 1)
    assert bounds(lambda s: s - 1) == (-1, 0)
    assert bounds(lambda s: (s - 1) * (s + 1)) == (-2, 0)
    assert bounds(lambda s: s * 0.5) is None
    assert bounds(lambda s: torch.ones_like(s)) == (1, 1)

    def counted(s):
        for _ in range(9):
            s = s + s
        return s

    assert bounds(counted) is None  # 512: bf16 holds no 257


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("threshold", [1.0, 0.5, 0.3, 0.1, -0.7, 1e-3, 3e-5, 1e-7, 1e-40, 1 + 2.0**-23, 0.1 + 2.0**-20, 0.0])
@pytest.mark.parametrize("compare", [operator.ge, operator.gt, operator.le, operator.lt, operator.eq, operator.ne])
def test_rounding_keeps_the_sign(dtype, threshold, compare):
    """Wherever a difference's rounding is left out, no value of the dtype tells."""
    h = every_value(dtype)
    single = torch.tensor(threshold, dtype=torch.float32)
    for number in (single, single.to(dtype).float()):  # eager rounds the number, or not
        for a, b in ((h.float(), number), (number, h.float())):
            rounded, wide = (a - b).to(dtype), a - b
            difference, *_ = traced(lambda h: compare(h - threshold, 0), dtype)
            if is_representable(difference):
                assert torch.equal(compare(rounded, 0), compare(wide, 0))


def test_which_differences_keep_it():
    def difference(function, *dtypes):
        return next(n for n in traced(function, *dtypes) if "sub" in n.name)

    both = (torch.float16, torch.float16)
    assert is_representable(difference(lambda h: (h - 1.0) >= 0, torch.float16))
    assert is_representable(difference(lambda h, w: (h - w) > 0.0, *both))
    assert is_representable(difference(lambda h: (1.0 - h) < 0, torch.float16))
    # 2^-14 - (2^-14 + 2^-30) is 0 in fp16; bf16 has smaller numbers
    assert not keeps_sign(difference(lambda h: (h - (2.0**-14 + 2.0**-30)) > 0, torch.float16))
    assert keeps_sign(difference(lambda h: (h - (2.0**-14 + 2.0**-30)) > 0, torch.bfloat16))
    assert not is_representable(difference(lambda h: (h - 1.0) >= 0.5, torch.float16))
    assert not is_representable(difference(lambda h, w: (h - w) >= w, *both))
    assert not is_representable(difference(lambda h: (h - 1.0 >= 0) * (h - 1.0), torch.float32))

    def read_twice(h):
        u = h - 1.0
        return (u >= 0) * u

    assert not is_representable(difference(read_twice, torch.float16))
    assert not keeps_sign(difference(lambda h, w: torch.sub(h, w, alpha=0.3) > 0, *both))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("wide", [False, True])
def test_all_values_through_a_kernel(dtype, wide, fresh):
    """Bit for bit, and NaN where eager has NaN: those that fp32 memory holds, too, which round to no number."""
    x = torch.stack([every_value(dtype), every_value(dtype).flip(0), every_value(dtype).roll(17)])
    w = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).view(torch.float32) if wide else torch.zeros(1 << 16)

    def step(x, w):
        v, spikes, potentials = torch.zeros_like(x[0]), [], []
        for t in range(x.shape[0]):
            h = v + ((x[t] - v) / 2.0 + w).to(x.dtype) if wide else v + (x[t] - v) / 2.0
            s = (h - 1.0 >= 0).to(x.dtype)
            v = s * 0.0 + (1 - s) * h
            spikes.append(s)
            potentials.append(v)
        return torch.stack(spikes), torch.stack(potentials)

    compiled = torch.compile(step, backend=snn)
    for got, expected in zip(compiled(x, w), step(x, w), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
