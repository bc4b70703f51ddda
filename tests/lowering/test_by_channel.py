"""Steps with batch norm of the potential, run channel by channel: eager's bits forward, its statistics, its gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import snn_compile
from snn_compile import neuron
from snn_compile.lowering.cpp import channel_kernel, direct_call
from snn_compile.lowering.registration import NAMESPACE
from tests.lowering.channel_layers import LAYERS, Layer, run
from tests.passes.capture import Spike

pytestmark = pytest.mark.usefixtures("op_by_op")


@pytest.fixture
def calls(fresh, monkeypatch):
    """Kernels run in Python, by direction of their entry."""
    found: list[str] = []
    if (direct := direct_call.direct(NAMESPACE)) is not None:
        direct.forget()
    run = channel_kernel.CpuChannelKernel.run

    def spy(self, operands, steps):
        ran = run(self, operands, steps)
        if ran:
            found.append(self.source.entry.rsplit("_", 1)[1])
        return ran

    monkeypatch.setattr(channel_kernel.CpuChannelKernel, "run", spy)
    return found


def compiled(layer):
    """Also where the step is so small that Inductor would get it."""
    return torch.compile(layer, backend="snn", fullgraph=True, options={"strict": True, "step_from": 2})


SHAPES = {
    "odd sizes": (5, 3, 7, 3, 5),
    "two steps": (2, 2, 3, 2, 2),
    "one channel": (4, 3, 1, 4, 4),
    "more rows than lanes": (3, 17, 2, 1, 2),
    "streamed": (9, 16, 8, 16, 16),
}


#: where not once each: a result is a copy of what the kernel fills, or one tensor is given twice
ASKED = {"time last": (2, 4), "raw potential carried": (1, 4)}
#: every layer in one shape, one layer in every shape
CASES = [(layer, "odd sizes") for layer in LAYERS] + [("hard reset", shape) for shape in SHAPES if shape != "odd sizes"]


@pytest.mark.parametrize(("layer", "size"), CASES)
def test_against_eager(calls, layer, size):
    shape = SHAPES[size]
    compare(calls, LAYERS[layer](shape[2]), torch.randn(shape) + 0.3, torch.randn(shape[1:]), ASKED.get(layer, (1, 1)))


def last(value):
    """The same numbers, channels innermost."""
    return value.movedim(-3, -1).contiguous().movedim(-1, -3)


#: channels fill one row or several, and leave lanes of the last one empty
CHANNELS_LAST = {
    "a tail": (5, 3, 7, 3, 5),
    "two rows": (3, 2, 32, 3, 3),
    "rows and a tail": (4, 2, 37, 2, 3),
    "one": (3, 2, 16, 1, 2),
}


@pytest.mark.parametrize("shared", (True, False), ids=("rows shared by threads", "blocks"))
@pytest.mark.parametrize("layer", LAYERS)
def test_channels_last(calls, monkeypatch, layer, shared):
    monkeypatch.setattr(channel_kernel, "SHARED_ROWS", 1 if shared else 1 << 30)
    for shape in CHANNELS_LAST.values() if layer == "hard reset" else [CHANNELS_LAST["rows and a tail"]]:
        calls.clear()
        counters.clear()
        torch._dynamo.reset()
        asked = (None if layer in (*ASKED, "back in time") else 1), None  # (torch 2.11 gives contiguous cotangents)
        compare(calls, LAYERS[layer](shape[2]), last(torch.randn(shape) + 0.3), last(torch.randn(shape[1:])), asked)


def test_operands_that_lie_in_another_way_are_copied(calls):
    x, v = torch.randn(5, 3, 7, 4, 4), torch.randn(3, 7, 4, 4)
    for a, b in ((last(x), v), (x, last(v)), (x.transpose(-1, -2), v), (x[:, :1].expand(5, 3, 7, 4, 4), v)):
        calls.clear()
        counters.clear()
        torch._dynamo.reset()
        compare(calls, Layer(7), a, b, asked=(None, None))


class Dense(Layer):
    """Values ``[N, C]``."""

    def __init__(self, channels, affine=True):
        super().__init__(channels, affine)
        self.norm = nn.BatchNorm1d(channels, affine=affine, momentum=0.3)


@pytest.mark.parametrize("shape", ((6, 5, 35), (4, 40, 3), (3, 2, 64)), ids=str)
@pytest.mark.parametrize("affine", (True, False))
def test_dense_layers(calls, shape, affine):
    compare(calls, Dense(shape[2], affine), torch.randn(shape) + 0.3, torch.randn(shape[1:]))


def compare(calls, eager, x, v, asked=(1, 1)):
    """`asked`: how many calls of each direction Python answers, None where operands may be copied; C++ answers the rest."""
    ours = copy.deepcopy(eager)
    weights = torch.randn(x.numel())
    run_ours = compiled(ours)
    for _ in range(2):  # the second call goes on from the first one's running statistics
        expected, expected_gradients = run(eager, x, v, weights)
        found, gradients = run(run_ours, x, v, weights)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(eager.buffers(), ours.buffers(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
        for a, b in zip(expected_gradients, gradients, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * a.abs().max().item())
    for direction, most, times in zip(("forward", "backward"), (2, 4), asked, strict=True):
        assert calls.count(direction) in (range(1, most + 1) if times is None else (times,))
    assert counters["snn_compile"]["recurrences_stepped"] == 1


def test_library_neuron_of_the_size_in_papers(calls):
    eager = neuron.MPBNLIFNode(out_channels=16, step_mode="m")
    ours = copy.deepcopy(eager)
    x = torch.randn(4, 16, 16, 16, 16)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    spikes = [eager(inputs[0]), torch.compile(ours, backend="snn")(inputs[1])]
    for y in spikes:
        y.square().mean().backward()
    assert torch.equal(*spikes) and torch.equal(eager.v, ours.v) and calls == ["forward", "backward"]
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-9)
    assert "channel by channel" in str(snn_compile.explain(copy.deepcopy(ours))(x))


class Spikes(nn.Module):
    """From a state of 0, which is one number; the last state is no result, so its cotangent is zero."""

    def __init__(self, channels):
        super().__init__()
        self.layer = Layer(channels)

    def forward(self, x, v):
        s, _ = self.layer(x, torch.zeros_like(v))
        return s, v * 2


@pytest.mark.parametrize("layout", (torch.clone, last), ids=("rows of space", "channels last"))
@pytest.mark.parametrize("shape", ((5, 3, 7, 60, 60), (4, 4, 16, 96, 96)), ids=("small results", "large results"))
def test_numbers_in_place_of_tensors(calls, shape, layout):
    asked = 1, (None if layout is last else 1)
    compare(calls, Spikes(shape[2]), layout(torch.randn(shape) + 0.3), torch.randn(shape[1:]), asked)


class Total(nn.Module):
    """The cotangent of the spikes is one number, and read from its end."""

    def __init__(self, channels):
        super().__init__()
        self.layer = LAYERS["back in time"](channels)

    def forward(self, x, v):
        y, last = self.layer(x, v)
        return y.sum().reshape(1), last


def test_a_cotangent_of_one_number(calls):
    compare(calls, Total(7), torch.randn(5, 3, 7, 3, 5) + 0.3, torch.randn(3, 7, 3, 5), asked=(1, None))


def test_operands_that_share_memory(calls):
    """They may not in another call: what Python finds of one that shares is not remembered."""
    eager, x, other = Layer(7), torch.randn(5, 3, 7, 3, 5), torch.randn(3, 7, 3, 5)
    ours = copy.deepcopy(eager)
    compiled_layer = compiled(ours)
    with torch.no_grad():
        for v in (x[0], other, x[1], other):
            for a, b in zip(eager(x, v), compiled_layer(x, v), strict=True):
                assert torch.equal(a, b)
    assert calls == ["forward"] * 2


def test_without_gradients(calls):
    eager = Layer(5)
    ours = copy.deepcopy(eager)
    x, v = torch.randn(6, 3, 5, 4, 4), torch.zeros(3, 5, 4, 4)
    with torch.no_grad():
        a, b = eager(x, v), compiled(ours)(x, v)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True)) and calls == ["forward"]
    torch.testing.assert_close(ours.norm.running_var, eager.norm.running_var)


@pytest.mark.parametrize("threads", (1, 3))
def test_any_number_of_threads(calls, threads):
    before = torch.get_num_threads()
    eager = Layer(5)
    x, v, weights = torch.randn(4, 3, 5, 4, 4), torch.randn(3, 5, 4, 4), torch.randn(4 * 3 * 5 * 16)
    try:
        torch.set_num_threads(threads)
        expected, found = (run(f, x, v, weights)[0] for f in (eager, compiled(copy.deepcopy(eager))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(p, q) for p, q in zip(expected, found, strict=True)) and calls


@pytest.mark.parametrize("case", ("fp64", "a layer norm beside it", "statistics of one sample"))
def test_near_misses_run_as_before(calls, case):
    class Other(Layer):
        def step(self, v, x):
            if case == "a layer norm beside it":
                v = F.layer_norm(v, v.shape[1:])
            h = F.instance_norm(v + x) if case == "statistics of one sample" else self.norm(v * 0.5 + x)
            s = Spike.apply(h - 0.5)
            return s, h * (1.0 - s)

    eager = Other(6)
    x, v = torch.randn(5, 3, 6, 4, 4), torch.randn(3, 6, 4, 4)
    if case == "fp64":
        eager, x, v = eager.double(), x.double(), v.double()
    ours = copy.deepcopy(eager)
    weights = torch.randn(x.numel(), dtype=x.dtype)
    expected, found = (run(f, x, v, weights)[0] for f in (eager, compiled(ours)))
    assert not calls
    assert (expected[0] == found[0]).float().mean() > 0.99


def test_small_steps_are_left_to_inductor(calls):
    x, v = torch.randn(4, 3, 5, 4, 4), torch.zeros(3, 5, 4, 4)
    torch.compile(Layer(5), backend="snn")(x, v)
    assert not calls and counters["snn_compile"]["recurrences_stepped"] == 0


def test_kernel_is_readable():
    torch._dynamo.reset()
    source = []
    load = channel_kernel.compiler.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel_kernel.compiler, "load", lambda text: source.append(text) or load(text))
        layer = Layer(3)
        compiled(layer)(torch.randn(4, 2, 3, 12, 12), torch.zeros(2, 3, 12, 12))
    (forward,) = (text for text in source if "_forward(" in text and "of a channel at a time" in text)
    assert forward.count("#pragma omp simd") == 4  # charge and sum; variance; fire and reset; last state
    assert forward.count("__builtin_fmaf(") == 2 and "sqrt" in forward
