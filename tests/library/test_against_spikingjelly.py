"""The same modules of SpikingJelly 2.0.0: same parameters, same inputs, equal outputs, states and gradients."""

from __future__ import annotations

import copy
import sys
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import nn

from snn_compile import functional, layer, neuron, surrogate

if "loguru" not in sys.modules:
    try:
        import loguru  # noqa: F401
    except ImportError:  # SpikingJelly only logs with it
        sys.modules["loguru"] = ModuleType("loguru")
        sys.modules["loguru"].logger = MagicMock()

their_neuron = pytest.importorskip("spikingjelly.activation_based.neuron", exc_type=ImportError)
their_layer = pytest.importorskip("spikingjelly.activation_based.layer", exc_type=ImportError)
their_surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate", exc_type=ImportError)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)  # SpikingJelly draws the gates of its gated LIF neuron with it


T, N, C = 6, 4, 8
SHAPES = {"2d": (T, N, C), "4d": (T, N, C, 3, 2)}


def inputs(shape, dtype, scale=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale + 0.3).to(dtype)


def run(module, x_seq):
    """Outputs and gradients of one multi-step call."""
    leaf = x_seq.clone().requires_grad_()
    y = module(leaf * 1)  # SpikingJelly's ILC neurons write to their input
    if isinstance(y, list):
        y = torch.stack(y)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weight).sum().backward()
    parameters = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return y.detach(), leaf.grad, parameters


def lambda_module(function):
    module = nn.Module()
    module.forward = function
    return module


def check(ours, theirs, x_seq, *, exact=True):
    theirs.to(x_seq.dtype), ours.to(x_seq.dtype)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    for module in (ours, theirs):
        if hasattr(module, "step_mode"):
            module.step_mode = "m"
    (y, grad, parameters), (their_y, their_grad, their_parameters) = run(ours, x_seq), run(theirs, x_seq)
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(y, their_y, **tolerance)
    assert y.abs().sum() > 0
    torch.testing.assert_close(grad, their_grad, rtol=1e-5, atol=1e-5)
    assert parameters.keys() == their_parameters.keys()
    for name, gradient in parameters.items():
        torch.testing.assert_close(gradient, their_parameters[name], rtol=1e-5, atol=1e-5)
    for name in ("v", "c", "w", "x", "out_i"):
        state = getattr(ours, name, None)
        if isinstance(state, torch.Tensor) and not isinstance(state, nn.Parameter) and hasattr(theirs, name):
            torch.testing.assert_close(state, getattr(theirs, name), rtol=1e-5, atol=1e-6)


RESETS = [0.0, -0.2, None]
NODES = [
    ("IFNode", {}),
    ("LIFNode", {"tau": 3.0, "decay_input": True}),
    ("LIFNode", {"tau": 3.0, "decay_input": False}),
    ("ParametricLIFNode", {"init_tau": 3.0, "decay_input": True}),
    ("ParametricLIFNode", {"init_tau": 3.0, "decay_input": False}),
    ("KLIFNode", {"scale_reset": False}),
    ("KLIFNode", {"scale_reset": True, "decay_input": False}),
    ("QIFNode", {}),
    ("EIFNode", {}),
    ("IzhikevichNode", {"a": 0.3, "b": 0.2, "w_rest": 0.1}),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("detach_reset", [False, True], ids=["grad", "detach"])
@pytest.mark.parametrize("v_reset", RESETS, ids=str)
@pytest.mark.parametrize(("name", "kwargs"), NODES, ids=lambda value: str(value))
def test_neurons(name, kwargs, v_reset, detach_reset, shape, dtype):
    kwargs = kwargs | {"v_reset": v_reset, "detach_reset": detach_reset}
    check(getattr(neuron, name)(**kwargs), getattr(their_neuron, name)(**kwargs), inputs(shape, dtype))


@pytest.mark.parametrize("detach_reset", [False, True], ids=["grad", "detach"])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("SimpleIFNode", {}),
        ("SimpleIFNode", {"v_reset": None}),
        ("SimpleLIFNode", {"tau": 2.5, "decay_input": True}),
        ("SimpleLIFNode", {"tau": 2.5, "decay_input": False}),
    ],
    ids=str,
)
def test_simple_neurons(name, kwargs, detach_reset):
    # v_reset is 0 or None: theirs starts from 0 whatever v_reset is
    kwargs = kwargs | {"detach_reset": detach_reset}
    check(getattr(neuron, name)(**kwargs), getattr(their_neuron, name)(**kwargs), inputs(SHAPES["2d"], torch.float64))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("v_reset", RESETS, ids=str)
def test_cuba_lif(v_reset, shape):
    check(neuron.CUBALIFNode(v_reset=v_reset), their_neuron.CUBALIFNode(v_reset=v_reset), inputs(shape, torch.float64))


@pytest.mark.parametrize("threshold_related", [False, True])
def test_liaf(threshold_related):
    ours, theirs = (library.LIAFNode(torch.tanh, threshold_related) for library in (neuron, their_neuron))
    ours.step_mode = "m"  # theirs puts out spikes in multi-step mode
    x_seq = inputs(SHAPES["2d"], torch.float64)
    y, grad, _ = run(ours, x_seq)
    their_y, their_grad, _ = run(lambda_module(lambda x_seq: torch.stack([theirs(x) for x in x_seq])), x_seq)
    torch.testing.assert_close((y, grad), (their_y, their_grad))


@pytest.mark.parametrize("decode", [None, "max-mem", "max-abs-mem", "mean-mem"], ids=str)
@pytest.mark.parametrize("name", ["NonSpikingIFNode", "NonSpikingLIFNode"])
def test_non_spiking(name, decode):
    ours, theirs = getattr(neuron, name)(decode=decode), getattr(their_neuron, name)(decode=decode)
    check(ours, theirs, inputs(SHAPES["4d"], torch.float64))


@pytest.mark.parametrize("inplane", [None, C])
def test_gated_lif(inplane):
    ours, theirs = neuron.GatedLIFNode(T, inplane), their_neuron.GatedLIFNode(T, inplane)
    check(ours, theirs, inputs(SHAPES["4d"], torch.float64))


@pytest.mark.parametrize("name", ["PSN", "MaskedPSN", "SlidingPSN"])
def test_parallel_neurons(name):
    args = {"PSN": (T,), "MaskedPSN": (3, T, 0.4), "SlidingPSN": (3,)}[name]
    check(getattr(neuron, name)(*args), getattr(their_neuron, name)(*args), inputs(SHAPES["4d"], torch.float64))


@pytest.mark.parametrize("name", ["MaskedPSN", "SlidingPSN"])
def test_parallel_neurons_step_by_step(name):
    args = {"MaskedPSN": (3, T, 1.0), "SlidingPSN": (3,)}[name]
    ours, theirs = getattr(neuron, name)(*args), getattr(their_neuron, name)(*args)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x_seq = inputs(SHAPES["4d"], torch.float32)
    y_seq = torch.stack([ours(x) for x in x_seq])
    assert torch.equal(y_seq, torch.stack([theirs(x) for x in x_seq]))
    ours.step_mode = "m"
    assert torch.equal(y_seq, ours(x_seq))


MPBN = [
    {"out_features": C},
    {"out_features": C, "decay_input": True, "v_reset": -0.2},
    {"out_channels": C, "v_reset": None},
    {"out_channels": C, "learnable_vth": True},
    {"out_features": C, "mpbn": False},
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kwargs", MPBN, ids=str)
def test_mpbn(kwargs, training):
    ours, theirs = neuron.MPBNLIFNode(**kwargs), their_neuron.MPBNLIFNode(**kwargs)
    if kwargs.get("mpbn", True):
        with torch.no_grad():
            for value in (theirs.vbn.weight, theirs.vbn.bias, theirs.vbn.running_mean, theirs.vbn.running_var):
                value.copy_(torch.rand(C) + 0.5)
    ours.train(training), theirs.train(training)
    check(ours, theirs, inputs(SHAPES["4d" if "out_channels" in kwargs else "2d"], torch.float64))
    if kwargs.get("mpbn", True):
        torch.testing.assert_close(ours.vbn.state_dict(), theirs.vbn.state_dict())


@pytest.mark.parametrize("running_stats", [False, True])
@pytest.mark.parametrize("normalize_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_folded_mpbn(training, normalize_residual, running_stats):
    ours, theirs = (library.MPBNLIFNode(out_features=C) for library in (neuron, their_neuron))
    with torch.no_grad():
        for value in (theirs.vbn.weight, theirs.vbn.bias, theirs.vbn.running_mean, theirs.vbn.running_var):
            value.copy_(torch.rand(C) + 0.5)  # gamma > 0 and the hard reset, where theirs is right
    ours.load_state_dict(theirs.state_dict())
    for node in (ours, theirs):
        node.re_parameterize_v_threshold(normalize_residual, running_stats)
        node.train(training).double().step_mode = "m"
    x_seq = inputs(SHAPES["2d"], torch.float64)
    y, their_y = ours(x_seq), theirs(x_seq)
    assert torch.equal(y, their_y)
    torch.testing.assert_close((ours.mu, ours.sigma2, ours.v), (theirs.mu, theirs.sigma2, theirs.v))
    if running_stats and training:
        assert ours.momentum.item() == pytest.approx(theirs.bn_momentum)


@pytest.mark.parametrize("v_reset", [0.0, -0.2])
@pytest.mark.parametrize("name", ["ILCIFNode", "ILCLIFNode", "ILCCUBALIFNode"])
def test_ilc(name, v_reset):
    ours, theirs = (getattr(library, name)(2, C // 2, v_reset=v_reset) for library in (neuron, their_neuron))
    check(ours, theirs, inputs(SHAPES["2d"], torch.float64))


LAYERS = [
    ("NeuNorm", {"in_channels": C, "height": 3, "width": 2}),
    ("NeuNorm", {"in_channels": C, "height": 3, "width": 2, "k": 0.5, "shared_across_channels": True}),
    ("SynapseFilter", {"tau": 5.0}),
    ("SynapseFilter", {"tau": 5.0, "learnable": True}),
]


@pytest.mark.parametrize(("name", "kwargs"), LAYERS, ids=str)
def test_layers(name, kwargs):
    ours, theirs = getattr(layer, name)(**kwargs), getattr(their_layer, name)(**kwargs)
    check(ours, theirs, inputs(SHAPES["4d"], torch.float64), exact=False)


def test_containers():
    linear = nn.Linear(C, 5).double()
    x_seq = inputs(SHAPES["2d"], torch.float64)
    for name, mods in (("SeqToANNContainer", (linear, nn.ReLU())), ("MultiStepContainer", (linear,))):
        ours, theirs = getattr(layer, name)(*copy.deepcopy(mods)), getattr(their_layer, name)(*copy.deepcopy(mods))
        torch.testing.assert_close(run(ours, x_seq)[:2], run(theirs, x_seq)[:2])


def test_recurrent_containers():
    x_seq = inputs(SHAPES["2d"], torch.float64)
    ours = layer.ElementWiseRecurrentContainer(neuron.LIFNode(), torch.add)
    theirs = their_layer.ElementWiseRecurrentContainer(their_neuron.LIFNode(), torch.add)
    check(ours, theirs, x_seq)

    def sub(library):
        return nn.Sequential(nn.Linear(C, 5), library.LIFNode(v_threshold=0.2))

    ours = layer.LinearRecurrentContainer(sub(neuron), C, 5)
    theirs = their_layer.LinearRecurrentContainer(sub(their_neuron), C, 5)
    check(ours, theirs, x_seq)


@pytest.mark.parametrize("training", [True, False])
def test_drop_connect_without_dropping(training):
    ours, theirs = layer.DropConnectLinear(C, 5, p=0.0), their_layer.DropConnectLinear(C, 5, p=0.0)
    ours.load_state_dict(theirs.state_dict())
    ours.train(training)
    x = inputs((N, C), torch.float32)
    torch.testing.assert_close(ours(x), theirs(x))


SURROGATES = [name for name in surrogate.__all__ if name not in ("SurrogateFunctionBase", "heaviside", "PoissonPass")]


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates(name):
    args = (3,) if name == "MultiLevelSpikeCount" else ()
    ours, theirs = getattr(surrogate, name)(*args), getattr(their_surrogate, name)(*args)
    x = torch.linspace(-3, 3, 601, dtype=torch.float64) + 1e-4
    for spiking in (True, False):
        if not spiking and name in ("SuperSpike", "FakeNumericalGradient"):
            continue
        ours.set_spiking_mode(spiking), theirs.set_spiking_mode(spiking)
        (y, gradient, _), (their_y, their_gradient, _) = run(ours, x), run(theirs, x)
        torch.testing.assert_close(y, their_y)
        torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-5)


def test_the_states_carry_over_between_calls_as_theirs_do():
    ours, theirs = neuron.LIFNode(step_mode="m"), their_neuron.LIFNode(step_mode="m")
    for seed in range(3):
        x_seq = inputs(SHAPES["2d"], torch.float32, seed=seed)
        assert torch.equal(ours(x_seq), theirs(x_seq))
    functional.reset_net(ours)
    assert ours.v == 0.0
