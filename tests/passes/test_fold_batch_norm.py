"""A batch norm with fixed statistics in a neuron: one kernel with eager's bits, and where it may be, a folded threshold."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import snn_compile
from snn_compile import neuron as library
from snn_compile.lowering.candidates import is_pointwise_op
from snn_compile.passes.fold_batch_norm import fold_batch_norm
from tests.passes.capture import Spike, infos, rerolled, x

CHANNELS = 1000


pytestmark = pytest.mark.usefixtures("fresh")


def parameters(channels: int = CHANNELS, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """mean, var, gamma of both signs and zero, beta of which some are over and some under the threshold of 1."""
    mean, var, gamma, beta = (torch.randn(channels, dtype=dtype) for _ in range(4))
    gamma[::7] = 0.0
    return [mean * 0.3, var.abs() + 0.1, gamma, beta]


def by_function(h, mean, var, gamma, beta):
    return F.batch_norm(h, mean, var, gamma, beta, eps=1e-3)


def without_weights(h, mean, var, gamma, beta):
    return F.batch_norm(h, mean, var)


def by_hand(h, mean, var, gamma, beta):
    mean, var, gamma, beta = (p.view(-1, *(1,) * (h.dim() - 2)) for p in (mean, var, gamma, beta))
    return (h - mean) * torch.rsqrt(var + 1e-3) * gamma + beta  # (eager's sqrt may be off by one unit)


def neuron(norm, reset, carried):
    """`carried`: the normalised potential is the one that goes on to the next step."""

    def run(x, *parameters):
        v, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            v = v + (x[t] - v) / 2.0
            h = norm(v, *parameters)
            s = Spike.apply(h - 1.0)
            v = h if carried else v
            v = v - s if reset == "soft" else v * (1.0 - s)
            out.append(s)
        return torch.stack(out), v

    return run


def compiled(function, **options):
    return torch.compile(function, backend="snn", fullgraph=True, options={"strict": True, **options})


def equal(a, b):
    return all(torch.equal(p, q) and p.stride() == q.stride() for p, q in zip(a, b, strict=True))


SHAPES = {
    "2-D": (4, 3, CHANNELS),
    "3-D": (3, 2, CHANNELS, 3),
    "4-D": (3, 2, CHANNELS, 2, 3),
    "one row": (3, 1, CHANNELS),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("carried", (False, True), ids=("raw", "carried"))
@pytest.mark.parametrize(
    ("norm", "reset"), ((by_function, "hard"), (by_function, "soft"), (without_weights, "hard"), (by_hand, "soft"))
)
def test_equals_eager_bit_for_bit_on_a_thousand_draws(norm, reset, carried, shape):
    function, given = neuron(norm, reset, carried), (torch.randn(shape) * 2.0, *parameters())
    with torch.no_grad():
        assert equal(compiled(function)(*given), function(*given))
    assert counters["snn_compile"]["recurrences_lowered"] == 1
    assert counters["snn_compile"]["batch_norms_folded"] == (norm is not by_hand)


def test_channels_last_and_doubles():
    function = neuron(by_function, "hard", True)
    images = torch.randn(4, 2, 5, 6, 7).permute(0, 1, 4, 2, 3)
    for given in ((images, *parameters(7)), (images.double(), *parameters(7, torch.float64))):
        with torch.no_grad():
            assert equal(compiled(function)(*given), function(*given))
    assert counters["snn_compile"]["batch_norms_folded"] == 2


def test_gradients_of_a_frozen_batch_norm():
    function, leaves = neuron(by_function, "hard", True), []
    for run in (function, compiled(function)):
        torch.manual_seed(1)
        mean, var, gamma, beta = parameters(5)
        wanted = [torch.randn(6, 7, 5).requires_grad_(), gamma.requires_grad_(), beta.requires_grad_()]
        spikes, v = run(wanted[0], mean, var, *wanted[1:])
        (spikes.square().sum() + v.square().sum()).backward()
        leaves.append([w.grad for w in wanted])
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    assert counters["snn_compile"]["batch_norms_folded"] == 1


def test_batch_norm_beside_a_neuron_joins_its_kernel():
    def function(x, *parameters):
        v, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            v = v + (by_function(x[t], *parameters) - v) / 2.0
            s = Spike.apply(v - 1.0)
            v = v - s
            out.append(s)
        return torch.stack(out)

    given = (torch.randn(5, 3, 8), *parameters(8))
    with torch.no_grad():
        found = snn_compile.explain(function)(*given)
        assert torch.equal(compiled(function)(*given), function(*given))
    (recurrence,) = found.recurrences
    assert "addcmul" in str(recurrence.step.graph)


def test_a_new_batch_size_needs_no_new_kernel():
    function, given = neuron(by_function, "hard", True), parameters(6)
    run = compiled(function)
    with torch.no_grad():
        for n in (3, 5, 9):  # dynamic from the second on
            inputs = torch.randn(4, n, 6, 2, 2)
            assert equal(run(inputs, *given), function(inputs, *given))
    assert counters["snn_compile"]["batch_norms_folded"] == counters["snn_compile"]["recurrences_lowered"] == 2


@pytest.mark.parametrize("shape", ((4, 3, 5), (4, 3, 5, 2, 7)), ids=["once a lane", "once a row"])
def test_kernel_is_one_multiply_add_and_explain_solves_for_the_threshold(shape):
    with torch.no_grad():
        found = snn_compile.explain(neuron(by_function, "hard", False))(torch.randn(shape), *parameters(5))
    (forward,) = (text for _, direction, text in found.kernels if direction == "forward")
    before, _, in_time = forward.partition("for (int64_t t = 0")
    assert before.count("sqrtf(") == 1 and "sqrt" not in in_time and in_time.count("__builtin_fmaf(") == 1
    assert re.search(r"v_ >= \(1 - \(\w+ - \w+\*scale\)\)/scale where scale > 0, <= where scale < 0", str(found))


# ------------------------------------------------------------------------------------------------------- the pass alone


def test_the_loop_means_the_same_before_and_after():
    mean, var, gamma, beta = parameters(5)
    captured = rerolled(neuron(by_function, "soft", True), x(), mean, var, gamma, beta)
    ((_, loop),) = captured.loops()
    assert captured.check(lambda gm: fold_batch_norm(loop, is_pointwise_op)) == 1
    assert F.batch_norm not in [n.target for n in loop.body.graph.nodes]


def training(h, mean, var, gamma, beta):
    return F.batch_norm(h, mean, var, gamma, beta, training=True)


def statistics_of_the_step(h, mean, var, gamma, beta):
    return F.batch_norm(h, h.detach().mean(0), var, gamma, beta)


def a_potential_with_gaps(h, mean, var, gamma, beta):
    return F.batch_norm(torch.stack([h, h], -1)[..., 0], mean, var, gamma, beta)


@pytest.mark.parametrize("norm", (training, statistics_of_the_step, a_potential_with_gaps))
def test_near_misses(norm):
    captured = rerolled(neuron(norm, "hard", True), x(), *parameters(5))
    ((_, loop),) = captured.loops()
    found = infos(loop)
    assert not any(found[n].pointwise for n in found if n.target is F.batch_norm)
    assert fold_batch_norm(loop, is_pointwise_op) == 0


def test_near_miss_half_precision_runs_as_before():
    function, given = neuron(by_function, "hard", True), (torch.randn(4, 3, 5).bfloat16(), *parameters(5, torch.bfloat16))
    with torch.no_grad():
        a, b = compiled(function)(*given), function(*given)
    assert counters["snn_compile"]["batch_norms_folded"] == 0
    assert (a[0] == b[0]).float().mean() > 0.8


# --------------------------------------------------------------------------------------------------- folded thresholds


@pytest.mark.parametrize("reset", ("hard", "soft"))
@pytest.mark.parametrize("norm", (by_function, by_hand))
@pytest.mark.parametrize("shape", ((6, 4, CHANNELS), (3, 2, CHANNELS, 2, 2)), ids=("2-D", "4-D"))
def test_threshold_form_is_the_same_network(norm, reset, shape):
    # multiples of 1/64 keep the potentials away from the thresholds by more than rounding
    given = (torch.randint(-128, 128, shape) / 64.0, *parameters())
    function = neuron(norm, reset, False)
    with torch.no_grad():
        assert equal(compiled(function, fold_batch_norm="threshold")(*given), function(*given))
    assert counters["snn_compile"]["thresholds_folded"] == 1


@pytest.mark.parametrize("compare", ("__ge__", "__gt__", "__le__", "__lt__"))
def test_threshold_form_of_every_comparison(compare):
    def function(x, mean, var, gamma, beta):
        v, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            v = 0.5 * v + x[t]
            s = getattr(2.0 - (v - mean) * gamma / var - beta, compare)(0.25).to(x.dtype)
            v = v - s
            out.append(s)
        return torch.stack(out)

    given = (torch.randint(-128, 128, (6, 4, CHANNELS)) / 64.0, *parameters())
    with torch.no_grad():
        assert torch.equal(compiled(function, fold_batch_norm="threshold")(*given), function(*given))
    assert counters["snn_compile"]["thresholds_folded"] == 1


def test_threshold_form_has_one_comparison_and_no_shift():
    with torch.no_grad():
        explain = snn_compile.explain(neuron(by_function, "hard", False), fold_batch_norm="threshold")
        found = explain(torch.randn(4, 3, 5), *parameters(5))
    (recurrence,) = found.recurrences
    assert [c.name for c in recurrence.consts] == ["sign", "threshold"]
    assert "addcmul" not in str(recurrence.step.graph) and "folded: sign and threshold" in str(found)


def test_threshold_form_refuses_to_change_the_network():
    given = (torch.randn(4, 3, 5), *parameters(5))
    with torch.no_grad():
        found = snn_compile.explain(neuron(by_function, "hard", True), fold_batch_norm="threshold")(*given)
    assert "folding the threshold alone would change the network" in str(found)
    wanted = (given[0].requires_grad_(), *given[1:])
    found = snn_compile.explain(neuron(by_function, "hard", False), fold_batch_norm="threshold")(*wanted)
    assert "call the model under torch.no_grad()" in str(found)
    assert counters["snn_compile"]["thresholds_folded"] == 0


def test_threshold_form_leaves_a_plain_neuron_alone():
    with torch.no_grad():
        function = neuron(lambda h: h, "hard", True)
        found = snn_compile.explain(function, fold_batch_norm="threshold")(torch.randn(4, 3, 5))
    assert "folded" not in str(found) and counters["snn_compile"]["thresholds_folded"] == 0


def test_library_neuron_in_evaluation_is_one_kernel():
    node = library.MPBNLIFNode(out_channels=6, step_mode="m").eval()
    for parameter in (node.vbn.running_mean, node.vbn.weight.data, node.vbn.bias.data):
        nn.init.normal_(parameter)
    given = torch.randn(4, 3, 6, 5, 5)
    with torch.no_grad():
        expected = node(given)
        node.reset()
        assert torch.equal(torch.compile(node, backend="snn")(given), expected)
    assert counters["snn_compile"]["recurrences_lowered"] == 1
