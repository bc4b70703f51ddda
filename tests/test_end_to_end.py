"""`torch.compile(..., backend="snn")` as a user calls it: Dynamo, the pipeline, Inductor, the C++ compiler."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import snn_compile
from snn_compile.backend import snn
from snn_compile.lowering.cpp import compiler
from tests import zoo

pytestmark = [
    pytest.mark.skipif(compiler.missing() is not None, reason="no C++ compiler"),
    pytest.mark.usefixtures("fresh"),
]


class Neuron(nn.Module):
    """Linear, then a parametric LIF over time."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, 5)
        self.tau = 2.0
        self.w = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        y = self.linear(x)
        v, out = torch.zeros_like(y[0]), []
        for t in range(y.shape[0]):
            v = v + (y[t] - v) / self.tau * self.w.sigmoid()
            s = zoo.Sigmoid.apply(v - 0.2, 4.0)
            v = v * (1 - s)
            out.append(s)
        return torch.stack(out)


class Recurrent(nn.Module):
    """Spikes go through a dense layer back to their neurons; the potential is normalised over the batch."""

    def __init__(self):
        super().__init__()
        self.linear, self.recurrent = nn.Linear(7, 5), nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        y = self.linear(x)
        v, s, out = torch.zeros_like(y[0]), torch.zeros_like(y[0]), []
        for t in range(y.shape[0]):
            v = self.norm(v + (y[t] + self.recurrent(s) - v) / 2.0)
            s = zoo.Sigmoid.apply(v - 0.2, 4.0)
            v = v * (1 - s)
            out.append(s)
        return torch.stack(out)


class PerStepNet(nn.Module):
    """The tutorial form: layers and neurons inside one loop over time."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 4 * 4, 10)

    def forward(self, x):
        v, u, out = None, None, []
        for t in range(x.shape[0]):
            y = F.max_pool2d(self.norm(self.conv(x[t])), 2)
            v = torch.zeros_like(y) if v is None else v
            v = v * 0.5 + y
            s = zoo.Sigmoid.apply(v - 0.5, 4.0)
            v = v * (1 - s)
            y = self.fc(s.flatten(1))
            u = torch.zeros_like(y) if u is None else u
            u = u * 0.9 + y
            out.append(u)
        return torch.stack(out)


def train_once(function, module, x):
    for p in module.parameters():
        p.grad = None
    y = function(x)
    (y.float() * torch.linspace(0.5, 1.0, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), [p.grad.clone() for p in module.parameters()], [b.clone() for b in module.buffers()]


def check_module(module, compiled, x, context=contextlib.nullcontext):
    """Forward bit for bit, gradients to rounding, buffers equal."""
    with context():
        expected = train_once(module, module, x)
        got = train_once(compiled, module, x)
    assert torch.equal(expected[0], got[0])
    assert expected[0].float().std() > 0  # some neurons fire and some do not
    for a, b in zip(expected[1], got[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max() + 1e-6))


X = (9, 6, 7)


@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"fullgraph": True}], ids=str)
def test_module(options):
    module = Neuron()
    check_module(module, torch.compile(module, backend=snn, **options), torch.randn(X) * 2)
    assert counters["snn_compile"]["recurrences_lowered"] >= 1


RECURRENT = {
    "plain": lambda m: torch.compile(m, backend=snn, fullgraph=True, options={"step_from": 4}),
    "checkpoint": lambda m: torch.compile(lambda x: checkpoint(m, x, use_reentrant=False), backend=snn, options={"step_from": 4}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", RECURRENT)
def test_recurrent_layer(how, training):
    module = Recurrent().train(training)
    reference = copy.deepcopy(module)
    x = torch.randn(X) * 2
    compiled = RECURRENT[how](module)
    for _ in range(2):
        expected, got = train_once(reference, reference, x), train_once(compiled, module, x)
        assert torch.equal(expected[0], got[0])
        # (what stands before a batch norm has a bias whose gradient is zero, but for rounding)
        largest = max(float(g.abs().max()) for g in expected[1])
        for a, b in zip(expected[1] + expected[2], got[1] + got[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest)
    assert counters["snn_compile"]["recurrences_stepped"] == 1


@pytest.mark.parametrize("declared", [False, True], ids=["as it comes", "mark_dynamic"])
def test_recurrent_layer_for_another_batch(declared):
    """Each size has a program of its own, unless the caller says that sizes change."""
    module = Recurrent().eval()
    compiled = torch.compile(module, backend=snn, options={"step_from": 4})
    for batch in (6, 5, 4):
        x = torch.randn(5, batch, 7) * 2
        if declared:
            torch._dynamo.mark_dynamic(x, 1)
        with torch.no_grad():
            assert torch.equal(compiled(x), module(x))
    assert counters["snn_compile"]["recurrences_stepped"] == (0 if declared else 3)


class Tokens(nn.Module):
    """A neuron over ``[T, B, C, N]`` behind a convolution over ``[T*B, C, N]``, as in spiking transformers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 8, 1, bias=False), nn.BatchNorm1d(8)

    def forward(self, x):
        return zoo.lif(self.norm(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2]))


def test_tokens_for_another_batch():
    """Inductor would lay out the symbolic series that the kernel saves like images, and fail."""
    module = Tokens()
    reference, compiled = copy.deepcopy(module), torch.compile(module, backend=snn)
    for batch in (2, 3, 5):
        x = torch.randn(4, batch, 4, 6) * 2
        expected, got = reference(x), compiled(x)
        assert torch.equal(got, expected) and expected.any()
        expected.sum().backward()
        got.sum().backward()
    torch.testing.assert_close(module.conv.weight.grad, reference.conv.weight.grad)


def test_recurrent_layer_under_autocast(op_by_op):
    """A batch norm of bf16 values with fp32 parameters stays with Inductor; without it the step is a program."""
    module = Recurrent().eval()
    x = torch.randn(X) * 2
    for norm, stepped in ((module.norm, 0), (nn.Identity(), 1)):
        module.norm = norm
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16):
            expected, got = (
                train_once(module, module, x),
                train_once(torch.compile(module, backend=snn, options={"step_from": 4}), module, x),
            )
        assert counters["snn_compile"]["recurrences_stepped"] == stepped
        for a, b in zip([expected[0], *expected[1]], [got[0], *got[1]], strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2**-6, atol=2**-6 * max(1.0, float(a.abs().max())))


def test_modes_and_inductor_options():
    module = Neuron()
    compiled = torch.compile(module, backend=snn, options={"max_autotune": False, "strict": True})
    check_module(module, compiled, torch.randn(X) * 2)


def test_autocast():
    """bf16 layers; the neuron's spikes are equal, gradients agree to bf16."""
    module = Neuron()
    x = torch.randn(X) * 2
    compiled = torch.compile(module, backend=snn)
    with torch.autocast("cpu", torch.bfloat16):
        expected = train_once(module, module, x)
        got = train_once(compiled, module, x)
    assert expected[0].dtype == torch.bfloat16 and torch.equal(expected[0], got[0])
    assert counters["snn_compile"]["recurrences_lowered"] == 1
    for a, b in zip(expected[1], got[1], strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * float(a.abs().max()))


def test_autocast_around_a_layer_of_each_step():
    layer = nn.Linear(7, 5)

    def network(x):
        v, out = torch.zeros(6, 5), []
        for t in range(x.shape[0]):
            with torch.autocast("cpu", torch.bfloat16):
                current = layer(x[t])
            v = 0.9 * v + current.float()
            s = zoo.Sigmoid.apply(v - 1.0, 4.0)
            v = v - s
            out.append(s)
        return torch.stack(out)

    x = torch.randn(X) * 2
    expected, got = (train_once(f, layer, x) for f in (network, torch.compile(network, backend=snn)))
    (report,) = snn_compile.explain(network)(x).recurrences
    assert "test_end_to_end.py:" in report.location  # (the switch of autocast, the step's first op, is of no place)
    assert torch.equal(expected[0], got[0]) and expected[0].std() > 0
    for a, b in zip(expected[1], got[1], strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * float(a.abs().max()))


def test_checkpoint():
    module = Neuron()
    compiled = torch.compile(lambda x: checkpoint(module, x, use_reentrant=False), backend=snn)
    check_module(module, compiled, torch.randn(X) * 2)
    assert counters["snn_compile"]["recurrences_lowered"] == 1


def checkpointed(compiled):
    return lambda x: checkpoint(compiled, x, use_reentrant=False)


def saved_elsewhere(compiled):
    def run(x):
        with torch.autograd.graph.save_on_cpu():
            return compiled(x)

    return run


@pytest.mark.parametrize("around", [checkpointed, saved_elsewhere])
def test_hooks_of_what_is_saved_around_the_first_call(around):
    """They are not for what the passes themselves differentiate."""
    module = Neuron()
    check_module(module, around(torch.compile(module, backend=snn)), torch.randn(X) * 2)
    assert counters["snn_compile"]["recurrences_lowered"] == 1
    assert not counters["snn_compile"]["pass_failures"]


class IteratesOverTime(nn.Module):
    """Dynamo takes the steps of a tensor from outside out of a checkpointed region."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, 7)
        self.decay = nn.Parameter(torch.tensor(0.8))

    def forward(self, x):
        return checkpoint(self.neuron, self.linear(x) * 2, use_reentrant=False)

    def neuron(self, x):
        v, out = torch.zeros_like(x[0]), []
        for step in x:
            v = self.decay * v + step
            s = zoo.Sigmoid.apply(v - 1.0, 4.0)
            v = v - s
            out.append(s)
        return torch.stack(out)


def test_checkpointed_iteration_over_time():
    module = IteratesOverTime()
    check_module(module, torch.compile(module, backend=snn), torch.randn(X) * 2)
    assert counters["snn_compile"]["recurrences_lowered"] == 1


def test_hooks():
    module = Neuron()
    module.linear.register_forward_hook(lambda mod, args, out: out * 1.5)
    check_module(module, torch.compile(module, backend=snn), torch.randn(X) * 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode):
    x = torch.randn(X) * 2
    with mode():
        assert torch.equal(torch.compile(zoo.lif, backend=snn)(x), zoo.lif(x))
    assert counters["snn_compile"]["recurrences_lowered"] == 1


def test_a_new_length_or_batch_compiles_no_kernel(monkeypatch):
    """T and N are run-time arguments."""
    compiled = torch.compile(zoo.lif, backend=snn)
    x = torch.randn(4, 5, 6, requires_grad=True)
    compiled(x).sum().backward()
    monkeypatch.setattr(compiler, "load", lambda *a, **k: pytest.fail("a kernel was compiled"))
    for shape in ((7, 5, 6), (4, 11, 6), (16, 3, 100), (5, 64)):
        x = torch.randn(shape).mul(2).requires_grad_()
        y = compiled(x)
        y.sum().backward()
        assert torch.equal(y, zoo.lif(x))


def test_layers_in_loops_of_their_own():
    """A loop of views alone is batched for the layer behind it, which reads slices then."""
    linear, pool = nn.Linear(8, 5), nn.AvgPool2d(2)

    def net(x):
        spikes = zoo.lif(x)
        pooled = [pool(spikes[t]) for t in range(x.shape[0])]
        flat = [pooled[t].flatten(1) for t in range(x.shape[0])]
        return zoo.lif(torch.stack([linear(flat[t]) for t in range(x.shape[0])]) * 4)

    x, other = (torch.rand(6, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).mul(2).requires_grad_() for _ in range(2))
    expected, got = net(x), torch.compile(net, backend=snn, options={"strict": True})(other)
    assert expected.any() and torch.equal(got, expected)
    assert counters["snn_compile"]["recurrences_lowered"] == 2 and counters["snn_compile"]["ops_time_batched"] >= 3
    expected.sum().backward()
    got.sum().backward()
    torch.testing.assert_close(other.grad, x.grad)


@pytest.mark.parametrize("training", [True, False])
def test_per_step_net(training):
    """Layers run once over all steps; batch norm in training keeps its per-step statistics and counters."""
    module = PerStepNet().train(training)
    twin = copy.deepcopy(module)
    x = torch.randn(6, 4, 2, 8, 8)
    expected = train_once(module, module, x)
    got = train_once(torch.compile(twin, backend=snn), twin, x)
    assert counters["snn_compile"]["ops_time_batched"] >= (2 if training else 5)
    torch.testing.assert_close(expected[0], got[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(expected[1], got[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(expected[1][0].abs().max() + 1))
    for a, b in zip(expected[2], got[2], strict=True):
        torch.testing.assert_close(a, b)
    if training:
        assert int(module.norm.num_batches_tracked) == int(twin.norm.num_batches_tracked) == 6


def test_batched_layers_are_one_op():
    """The graph holds one large convolution and one large matmul."""
    graphs = []

    def spy(gm, inputs, **_):
        from snn_compile.config import Config
        from snn_compile.pipeline import run_pipeline

        graphs.append(run_pipeline(gm, Config())[0])
        return graphs[-1].forward

    torch.compile(PerStepNet().eval(), backend=spy)(torch.randn(6, 4, 2, 8, 8))
    targets = [n.target for n in graphs[0].graph.nodes]
    assert targets.count(torch.conv2d) == 1
    assert targets.count(F.linear) == 1


def ops_that_are_decomposed(x):
    """One state an op; all are ATen's to the bit."""
    low = high = own = leaky = hard = torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        low = torch.lerp(low, x[t], 0.3)
        high = torch.lerp(high, x[t], 0.7)
        own = torch.lerp(own, x[t], x[t])
        leaky = F.leaky_relu(leaky * 0.5 + x[t], 0.1)
        hard = F.hardswish(hard * 0.5 + x[t])
        out.append(torch.stack((low, high, own, leaky, hard)))
    return torch.stack(out)


def ops_that_jump(x):
    phase = soft = cut = torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        phase = (phase + x[t]) % 0.7
        soft = F.softshrink(soft * 0.5 + x[t], 0.3) + F.softshrink(x[t])
        cut = F.hardshrink(cut * 0.5 + torch.where(torch.isinf(x[t]), 0.0, x[t]), 0.3)
        out.append(torch.stack((phase, soft, cut)))
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", [ops_that_are_decomposed, ops_that_jump])
def test_ops_that_are_decomposed_have_eager_s_bits(function, dtype):
    x = torch.randn(6, 4, 64, dtype=torch.float64).to(dtype)
    reference, given = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch._dynamo.reset()
    counters.clear()
    expected = function(reference)
    got = torch.compile(function, backend=snn, options={"strict": True})(given)
    assert torch.equal(got, expected) and counters["snn_compile"]["recurrences_lowered"] > 0
    expected.sum().backward()
    got.sum().backward()
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5  # (eager rounds bf16 after every op)
    torch.testing.assert_close(given.grad, reference.grad, rtol=tolerance, atol=tolerance)


class Sech2(torch.autograd.Function):
    """The derivative of tanh, as it is often written."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad / torch.cosh(2 * u) ** 2


def resonator(x):
    """Its amplitude fires, its phase is kept."""
    real = imaginary = torch.zeros_like(x[0])
    spikes, phases = [], []
    for t in range(x.shape[0]):
        real, imaginary = 0.8 * real - 0.4 * imaginary + x[t], 0.4 * real + 0.8 * imaginary
        amplitude = torch.hypot(real, imaginary + 0.1)
        s = Sech2.apply(amplitude - 1.0)
        phases.append(torch.atan2(imaginary, real + 2.0) + F.logsigmoid(amplitude))
        real, imaginary = real * (1 - s), imaginary * (1 - s)
        spikes.append(s)
    return torch.stack(spikes), torch.stack(phases)


def test_resonators_with_a_hyperbolic_surrogate():
    reference, given = (torch.linspace(-3, 3, 6 * 4 * 17, dtype=torch.float64).view(6, 4, 17).requires_grad_() for _ in range(2))
    torch._dynamo.reset()
    counters.clear()
    expected = resonator(reference)
    got = torch.compile(resonator, backend=snn, options={"strict": True})(given)
    assert torch.equal(got[0], expected[0]) and counters["snn_compile"]["recurrences_lowered"] == 1
    torch.testing.assert_close(got[1], expected[1], rtol=1e-12, atol=1e-12)
    sum(r.sum() for r in expected).backward()
    sum(r.sum() for r in got).backward()
    torch.testing.assert_close(given.grad, reference.grad, rtol=1e-9, atol=1e-9)


def test_under_anomaly_detection():
    torch._dynamo.reset()
    counters.clear()
    x = torch.rand(6, 4, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        torch.compile(ops_that_are_decomposed, backend=snn, options={"strict": True})(x).sum().backward()
    assert counters["snn_compile"]["recurrences_lowered"] > 0


class Delayed(nn.Module):
    """Spikes come back after some steps; those that are under way live on in a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, 5)
        self.register_buffer("line", torch.zeros(3, 4, 5))

    def forward(self, x):
        v, out, line = torch.zeros(4, 5), [], self.line
        for t in range(x.shape[0]):
            v = v + (self.linear(x[t]) - 0.5 * line[-1] - v) / 2.0
            s = zoo.Sigmoid.apply(v - 0.2, 4.0)
            v = v * (1 - s)
            line = torch.roll(line, 1, 0)
            line[0] = s
            out.append(s)
        self.line = line.detach()
        return torch.stack(out)


def test_delayed_spikes_between_calls(op_by_op):
    module, x = Delayed(), torch.rand(8, 4, 7) * 4
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, backend=snn, options={"strict": True})
    for _ in range(2):
        expected, got = module(x), compiled(x)
        assert expected.any() and torch.equal(got, expected) and torch.equal(twin.line, module.line)
        expected.sum().backward()
        got.sum().backward()
        torch.testing.assert_close(twin.linear.weight.grad, module.linear.weight.grad)
    assert counters["snn_compile"]["recurrences_lowered"] == 1 and counters["snn_compile"]["ops_time_batched"] >= 1
