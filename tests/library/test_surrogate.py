"""Surrogates: the forward is the step, the backward is the gradient, and the gradient is the primitive's derivative."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from snn_compile import surrogate

DEFAULTS = [
    surrogate.PiecewiseQuadratic(),
    surrogate.PiecewiseExp(),
    surrogate.Sigmoid(),
    surrogate.SoftSign(),
    surrogate.SuperSpike(),
    surrogate.ATan(),
    surrogate.NonzeroSignLogAbs(),
    surrogate.Erf(),
    surrogate.PiecewiseLeakyReLU(),
    surrogate.SquarewaveFourierSeries(),
    surrogate.S2NN(),
    surrogate.QPseudoSpike(),
    surrogate.LeakyKReLU(),
    surrogate.FakeNumericalGradient(),
    surrogate.LogTailedReLU(),
    surrogate.Rect(),
    surrogate.DeterministicPass(),
]
OTHERS = [
    surrogate.PiecewiseQuadratic(0.7),
    surrogate.PiecewiseExp(3.0),
    surrogate.Sigmoid(1.5),
    surrogate.SoftSign(0.5),
    surrogate.ATan(4.0),
    surrogate.NonzeroSignLogAbs(2.5),
    surrogate.Erf(0.5),
    surrogate.PiecewiseLeakyReLU(0.5, 0.1),
    surrogate.SquarewaveFourierSeries(4, 6.0),
    surrogate.S2NN(2.0, 0.5),
    surrogate.QPseudoSpike(3.5),
    surrogate.LeakyKReLU(0.2, 2.0),
    surrogate.LogTailedReLU(0.3),
    surrogate.Rect(2.0),
]
COUNT = surrogate.MultiLevelSpikeCount(4)
ALL = [*DEFAULTS, *OTHERS]


def has_primitive(function):
    return type(function).primitive_function is not surrogate.SurrogateFunctionBase.primitive_function


def gradient(function, x):
    x = x.clone().requires_grad_()
    function(x).sum().backward()
    return x.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", ALL, ids=repr)
def test_forward_is_the_step(function, dtype):
    x = torch.tensor([-2.0, -1e-3, -0.0, 0.0, 1e-3, 2.0], dtype=dtype)
    assert torch.equal(function(x), torch.tensor([0, 0, 1, 1, 1, 1], dtype=dtype))
    assert gradient(function, x).dtype == dtype


@pytest.mark.parametrize("function", [f for f in (*ALL, COUNT) if has_primitive(f)], ids=repr)
def test_gradient_is_the_derivative_of_the_primitive(function):
    # off the kinks, which lie at multiples of 0.1 for the parameters above
    x = torch.arange(-3, 3, 0.1, dtype=torch.float64) + 0.0437
    smooth = copy.deepcopy(function)
    smooth.set_spiking_mode(False)
    numeric = (smooth(x + 1e-6) - smooth(x - 1e-6)) / 2e-6
    # the 1e-5 inside S2NN's logarithm is not in its gradient
    torch.testing.assert_close(gradient(function, x), numeric, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("function", [f for f in ALL if has_primitive(f)], ids=repr)
def test_primitive_differentiates_itself(function):
    smooth = copy.deepcopy(function)
    smooth.set_spiking_mode(False)
    x = torch.linspace(-2.03, 2.01, 20, dtype=torch.float64)
    torch.testing.assert_close(gradient(smooth, x), gradient(function, x), rtol=2e-5, atol=1e-9)


def test_super_spike_gradient():
    x = torch.tensor([-1.0, 0.0, 3.0])
    torch.testing.assert_close(gradient(surrogate.SuperSpike(2.0), x), torch.tensor([0.5, 2.0, 0.125]))


def test_fake_numerical_gradient_is_capped_at_zero_of_either_sign():
    x = torch.tensor([-10.0, -0.0, 0.0, 1e-9, 5.0])
    torch.testing.assert_close(gradient(surrogate.FakeNumericalGradient(), x), torch.tensor([0.1, 0.3, 0.3, 0.3, 0.2]))


def test_multi_level_spike_count_counts_and_passes_the_gradient_in_its_window():
    x = torch.tensor([-0.5, 0.4, 1.6, 3.9, 5.0])
    assert torch.equal(COUNT(x), torch.tensor([0.0, 0.0, 2.0, 4.0, 4.0]))
    assert torch.equal(gradient(COUNT, x), torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))
    wide = surrogate.MultiLevelSpikeCount(4, grad_window=(-1.0, 5.0))
    assert torch.equal(gradient(wide, x), torch.ones(5))


def test_poisson_pass_draws_with_probability_x():
    torch.manual_seed(0)
    x = torch.full((20_000,), 0.3)
    assert set(surrogate.PoissonPass()(x).tolist()) == {0.0, 1.0}
    assert abs(surrogate.PoissonPass()(x).mean() - 0.3) < 0.02
    assert torch.equal(gradient(surrogate.PoissonPass(), x), torch.ones_like(x))


def test_second_derivative():
    x = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(surrogate.Sigmoid(2.0)(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    s = torch.sigmoid(2 * x)
    torch.testing.assert_close(second, 4 * s * (1 - s) * (1 - 2 * s))


def test_works_under_functorch():
    function = surrogate.Sigmoid()
    x = torch.randn(3)
    each = torch.vmap(torch.func.grad(function))(x)
    torch.testing.assert_close(each, gradient(function, x))


def test_a_changed_parameter_counts():
    function = surrogate.Sigmoid(1.0)
    function.alpha = 4.0
    x = torch.randn(5)
    assert torch.equal(gradient(function, x), gradient(surrogate.Sigmoid(4.0), x))


@pytest.mark.parametrize("function", [*ALL, COUNT, surrogate.PoissonPass()], ids=repr)
def test_copies_and_pickles(function):
    x = torch.rand(5)
    for other in (copy.deepcopy(function), pickle.loads(pickle.dumps(function))):
        assert repr(other) == repr(function)
        assert torch.equal(gradient(other, x), gradient(function, x))


def test_a_surrogate_of_the_users_own():
    class Triangle(surrogate.SurrogateFunctionBase):
        def __init__(self, alpha=1.0):
            super().__init__(alpha=alpha)

        @staticmethod
        def gradient(x, alpha):
            return alpha * torch.relu(1 - x.abs())

    x = torch.tensor([-0.5, 0.25, 3.0])
    assert torch.equal(gradient(Triangle(2.0), x), torch.tensor([1.0, 1.5, 0.0]))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(Triangle(2.0), backend=backend, fullgraph=True)(x)
    assert [n.target for n in graphs[0].graph.nodes if n.op == "call_function"] == [Triangle.spiking_function]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: surrogate.Sigmoid(0.0), r"alpha must be greater than 0, but is 0.0"),
        (lambda: surrogate.ATan(-1.0), r"alpha must be greater than 0, but is -1.0"),
        (lambda: surrogate.QPseudoSpike(1.0), r"alpha must be greater than 1, but is 1.0"),
        (lambda: surrogate.PiecewiseLeakyReLU(w=-2.0), r"w must be greater than 0, but is -2.0"),
        (lambda: surrogate.SquarewaveFourierSeries(n=1), r"n must be an integer of at least 2, but is 1"),
        (lambda: surrogate.MultiLevelSpikeCount(0), r"max_spike_count must be an integer of at least 1, but is 0"),
        (lambda: surrogate.MultiLevelSpikeCount(2, grad_window=(1.0, 0.0)), r"grad_window .* but is \(1.0, 0.0\)"),
        (lambda: surrogate.SuperSpike(spiking=False), r"spiking must be True for SuperSpike, but is False"),
    ],
)
def test_bad_values_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
