"""Bad arguments and inputs raise errors that name the argument, its value and what is allowed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from snn_compile import layer, neuron
from snn_compile.tempotron import Tempotron

CONSTRUCTION = [
    (lambda: neuron.IFNode(v_threshold=1), TypeError, "v_threshold must be a float, but is 1"),
    (lambda: neuron.IFNode(v_threshold=None), TypeError, "v_threshold must be a float, but is None"),
    (lambda: neuron.IFNode(v_reset="0"), TypeError, "v_reset must be a float or None, but is '0'"),
    (lambda: neuron.IFNode(detach_reset=1), TypeError, "detach_reset must be True or False, but is 1"),
    (lambda: neuron.IFNode(store_v_seq=None), TypeError, "store_v_seq must be True or False, but is None"),
    (lambda: neuron.LIFNode(tau=1.0), ValueError, "tau must be a float greater than 1, but is 1.0"),
    (lambda: neuron.LIFNode(tau=2), ValueError, "tau must be a float greater than 1, but is 2"),
    (lambda: neuron.LIFNode(tau=float("nan")), ValueError, "tau must be a float greater than 1, but is nan"),
    (lambda: neuron.SimpleLIFNode(0.5, True), ValueError, "tau must be a float greater than 1, but is 0.5"),
    (lambda: neuron.ParametricLIFNode(init_tau=0.5), ValueError, "init_tau must be a float greater than 1"),
    (lambda: neuron.NonSpikingLIFNode(tau=1.0), ValueError, "tau must be a float greater than 1, but is 1.0"),
    (lambda: neuron.NonSpikingIFNode(decode="max"), ValueError, "decode must be one of .*'max-mem'.* but is 'max'"),
    (lambda: neuron.QIFNode(a0=0.0), ValueError, "a0 must be greater than 0, but is 0.0"),
    (lambda: neuron.EIFNode(delta_T=-1.0), ValueError, "delta_T must be greater than 0, but is -1.0"),
    (lambda: neuron.IzhikevichNode(tau_w=2), TypeError, "tau_w must be a float, but is 2"),
    (lambda: neuron.ALIFNode(rho=1.5), ValueError, r"rho must lie in \[0, 1\], but is 1.5"),
    (lambda: neuron.LIAFNode(3, True), TypeError, "act must be a function of a tensor, but is 3"),
    (lambda: neuron.GatedLIFNode(0), ValueError, "T must be an integer of at least 1, but is 0"),
    (lambda: neuron.GatedLIFNode(4, init_tau=1.0), ValueError, "init_tau must lie between 0 and 1, but is 1.0"),
    (lambda: neuron.GatedLIFNode(4, step_mode="s"), ValueError, "step_mode must be one of 'm', but is 's'"),
    (lambda: neuron.MPBNLIFNode(), ValueError, "give exactly one of out_features .* not None and None"),
    (lambda: neuron.MPBNLIFNode(out_features=1, out_channels=2), ValueError, "exactly one of .* not 1 and 2"),
    (lambda: neuron.ILCIFNode(0, 2), ValueError, "act_dim must be an integer of at least 1, but is 0"),
    (lambda: neuron.PSN(-1), ValueError, "T must be an integer of at least 1, but is -1"),
    (lambda: layer.Dropout(1.0), ValueError, r"p must lie in \[0, 1\), but is 1.0"),
    (lambda: layer.DropConnectLinear(2, 2, p=-0.1), ValueError, r"p must lie in \[0, 1\), but is -0.1"),
    (lambda: layer.SynapseFilter(tau=1.0), ValueError, "tau must be greater than 1, but is 1.0"),
    (lambda: layer.NeuNorm(0, 2, 2), ValueError, "in_channels must be an integer of at least 1, but is 0"),
    (
        lambda: layer.ChannelsPool(nn.MaxPool2d(2)),
        TypeError,
        "pool must be a MaxPool1d or an AvgPool1d, but is MaxPool2d",
    ),
    (lambda: layer.STDPLearner(0.5, 2.0, abs, abs), ValueError, "tau_pre must be at least 1, but is 0.5"),
    (
        lambda: layer.MultiStepContainer(neuron.LIFNode(step_mode="m")),
        ValueError,
        "step_mode must be 's' for a LIFNode",
    ),
    (
        lambda: layer.SeqToANNContainer(neuron.LIFNode()),
        ValueError,
        "must be stateless in a SeqToANNContainer, but LIF",
    ),
    (lambda: Tempotron(2, 2, 10, tau=1.0), ValueError, "tau must be greater than 3.75, but is 1.0"),
    (lambda: Tempotron(2, 0, 10), ValueError, "out_features must be an integer of at least 1, but is 0"),
]


@pytest.mark.parametrize(("make", "error", "message"), CONSTRUCTION)
def test_construction(make, error, message):
    with pytest.raises(error, match=message):
        make()


CALLS = [
    (lambda: neuron.LIFNode(step_mode="m"), (5,), r"x_seq must be \[T, N, \*\].* but is \[5\]"),
    (lambda: neuron.LIFNode(step_mode="m"), (0, 5), r"x_seq must be \[T, N, \*\] with T of at least 1.* is \[0, 5\]"),
    (lambda: neuron.NonSpikingLIFNode(), (5,), r"x_seq must be \[T, N, \*\].* but is \[5\]"),
    (
        lambda: neuron.MPBNLIFNode(out_features=3),
        (2, 4),
        r"x must be \[N, out_features\] with 3 channels.* is \[2, 4\]",
    ),
    (lambda: neuron.MPBNLIFNode(out_channels=3), (2, 3), r"x must be \[N, out_channels, H, W\].* but is \[2, 3\]"),
    (lambda: neuron.MPBNLIFNode(out_features=3), (2, 3, 4), r"x must be \[N, out_features\].* but is \[2, 3, 4\]"),
    (lambda: neuron.ILCIFNode(2, 3), (4, 2, 5), r"x_seq must be .* = \[T, N, 6\], but is \[4, 2, 5\]"),
    (lambda: neuron.GatedLIFNode(3), (4, 2, 5), r"the number of steps of x_seq must be one of 3, but is 4"),
    (lambda: neuron.GatedLIFNode(4, 3), (4, 2, 5), r"x_seq must be \[T, N, C, \*\] with C = inplane = 3, but is"),
    (lambda: neuron.PSN(3), (4, 2), r"x_seq must have T = 3 steps.* but is \[4, 2\]"),
    (lambda: layer.NeuNorm(2, 3, 3), (1, 2, 3, 4), r"\[N, C, H, W\] = .*2, 3, 3.* but is \[1, 2, 3, 4\]"),
    (lambda: layer.DCT(2), (3, 5, 4), r"divisible by kernel_size = 2, but x is \[3, 5, 4\]"),
    (lambda: layer.AXAT(3, 2), (3, 4), r"x must be .* = \[\*, 3, 3\], but is \[3, 4\]"),
    (lambda: layer.ChannelsPool(nn.MaxPool1d(2)), (3, 4), r"x must be \[N, C, H, W\], but is \[3, 4\]"),
    (lambda: layer.Dropout2d(), (3, 4), r"x must be \[N, C, H, W\] at each step, but is \[3, 4\]"),
    (lambda: layer.DropConnectLinear(3, 2), (3, 4), r"x must be \[N, in_features = 3\].* but is \[3, 4\]"),
    (
        lambda: layer.ElementWiseRecurrentContainer(nn.Linear(4, 2), torch.add),
        (3, 4),
        r"keep the shape \[3, 4\].*\[3, 2\]",
    ),
]


@pytest.mark.parametrize(("make", "shape", "message"), CALLS)
def test_input_rank_and_shape(make, shape, message):
    with pytest.raises(ValueError, match=message):
        make()(torch.zeros(shape))


@pytest.mark.parametrize("make", [neuron.LIFNode, neuron.CUBALIFNode, layer.SynapseFilter])
def test_integer_inputs_raise(make):
    with pytest.raises(TypeError, match=r"x must be a tensor of floating point, but its dtype is torch.int64"):
        make()(torch.ones(2, 3, dtype=torch.int64))
