"""Layers against their equations, and the fixes that they carry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from snn_compile import functional, layer, neuron


def test_neu_norm():
    norm = layer.NeuNorm(2, 1, 1, k=0.5, step_mode="m")
    with torch.no_grad():
        norm.w.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1))
    spikes = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).view(2, 1, 2, 1, 1)
    # x: 0.5/4*2 = 0.25, then 0.5*0.25 + 0.125*1 = 0.25
    assert norm(spikes).flatten().tolist() == pytest.approx([0.75, 0.5, -0.25, 0.5])
    assert norm.x.shape == (1, 1, 1, 1)


def test_dct_is_orthonormal_and_blockwise():
    dct = layer.DCT(4)
    assert torch.allclose(dct.kernel @ dct.kernel.T, torch.eye(4), atol=1e-6)
    x = torch.randn(2, 3, 8, 12)
    y = dct(x)
    block = dct.kernel @ x[1, 2, 4:, 8:] @ dct.kernel.T
    torch.testing.assert_close(y[1, 2, 4:, 8:], block)
    torch.testing.assert_close(y.square().sum(), x.square().sum())
    assert dct(torch.ones(4, 4))[0, 0].item() == pytest.approx(4.0)


def test_axat():
    axat, x = layer.AXAT(3, 5), torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(axat(x)[1, 2], axat.A @ x[1, 2] @ axat.A.T)


@pytest.mark.parametrize("pool", [nn.MaxPool1d(2), nn.AvgPool1d(2, stride=1)])
def test_channels_pool(pool):
    x = torch.randn(2, 4, 3, 5)
    y = layer.ChannelsPool(pool)(x)
    torch.testing.assert_close(y[1, :, 2, 3], pool(x[1, :, 2, 3].view(1, 1, -1)).flatten())


@pytest.mark.parametrize("make", [layer.Dropout, layer.Dropout2d, layer.MultiStepDropout, layer.MultiStepDropout2d])
def test_dropout_keeps_its_mask_until_reset(make):
    torch.manual_seed(0)
    dropout = make(0.4)
    dropout.step_mode = "m"
    x_seq = torch.ones(4, 50, 20, 2, 2)
    y_seq = dropout(x_seq)
    assert torch.equal(y_seq, dropout(x_seq))
    assert all(torch.equal(y, y_seq[0]) for y in y_seq)
    assert y_seq.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert y_seq.mean().item() == pytest.approx(1.0, abs=0.1)
    if "2d" in make.__name__:
        assert all(len(channel.unique()) == 1 for channel in y_seq[0].flatten(0, 1))
    dropout.reset()
    assert not torch.equal(y_seq, dropout(x_seq))
    dropout.eval()
    assert dropout(x_seq) is x_seq


def test_dropout_defaults():
    assert [make().p for make in (layer.Dropout, layer.Dropout2d)] == [0.5, 0.2]
    assert [make().p for make in (layer.MultiStepDropout, layer.MultiStepDropout2d)] == [0.5, 0.2]


@pytest.mark.parametrize("learnable", [False, True])
def test_synapse_filter(learnable):
    synapse = layer.SynapseFilter(tau=4.0, learnable=learnable, step_mode="m")
    spikes = torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)
    assert synapse(spikes).flatten().tolist() == pytest.approx([1.0, 0.75, 1.75])


# ------------------------------------------------------------------------------------------------------ drop connect


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_drop_connect_with_p_0_drops_nothing(training, bias, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(*shape))  # the smallest number drawn
    drop = layer.DropConnectLinear(5, 3, bias, p=0.0).train(training)
    x = torch.randn(4, 5, requires_grad=True)
    y = drop(x)
    torch.testing.assert_close(y, torch.relu(nn.functional.linear(x, drop.weight, drop.bias)))
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_drop_connect_drops_weights_for_each_sample():
    torch.manual_seed(0)
    drop = layer.DropConnectLinear(1, 1, p=0.25, activation=None)
    with torch.no_grad():
        drop.weight.fill_(1.0)
        drop.bias.fill_(10.0)
    y = drop(torch.ones(8000, 1))
    values, counts = y.unique(return_counts=True)
    assert values.tolist() == [0.0, 1.0, 10.0, 11.0]
    torch.testing.assert_close(counts / 8000, torch.tensor([1, 3, 3, 9]) / 16, atol=0.03, rtol=0)


def test_drop_connect_keeps_its_masks_where_invariant():
    torch.manual_seed(0)
    x = torch.randn(4, 20)
    varying, invariant = layer.DropConnectLinear(20, 8), layer.DropConnectLinear(20, 8, invariant=True)
    assert not torch.equal(varying(x), varying(x))
    first = invariant(x)
    assert torch.equal(first, invariant(x))
    functional.reset_net(invariant)
    assert not torch.equal(first, invariant(x))


def test_drop_connect_matches_the_moments_in_eval():
    torch.manual_seed(0)
    drop = layer.DropConnectLinear(6, 4, p=0.3, samples_num=20_000, activation=None)
    x = torch.randn(2, 6)
    mean = drop.eval()(x)
    torch.testing.assert_close(mean, 0.7 * nn.functional.linear(x, drop.weight, drop.bias), atol=0.02, rtol=0)
    drop.activation = nn.Identity()
    drop.activation.forward = torch.square
    want = mean.square() + 0.21 * (x.square() @ drop.weight.square().T + drop.bias.square())
    torch.testing.assert_close(drop(x), want, atol=0.03, rtol=0.05)


# -------------------------------------------------------------------------------------------------------- containers


def test_containers_run_over_time():
    linear, x_seq = nn.Linear(4, 3), torch.randn(5, 2, 4)
    torch.testing.assert_close(layer.SeqToANNContainer(linear, nn.ReLU())(x_seq), torch.relu(linear(x_seq)))
    stepped = layer.MultiStepContainer(linear, neuron.LIFNode())(x_seq)
    torch.testing.assert_close(stepped, neuron.LIFNode(step_mode="m")(linear(x_seq)))


def test_element_wise_recurrence_hands_x_first():
    container = layer.ElementWiseRecurrentContainer(nn.Identity(), lambda x, y: x - 2 * y, step_mode="m")
    assert container(torch.ones(3, 1, 1)).flatten().tolist() == [1.0, -1.0, 3.0]


def test_linear_recurrence():
    container = layer.LinearRecurrentContainer(nn.Identity(), 2, 2, step_mode="m")
    x_seq = torch.randn(3, 4, 2)
    y, want = torch.zeros(4, 2), []
    for x in x_seq:
        y = container.rc(torch.cat((x, y), -1))
        want.append(y)
    torch.testing.assert_close(container(x_seq), torch.stack(want))
    assert layer.LinearRecurrentContainer(nn.Identity(), 2, 2, bias=False).rc.bias is None


# -------------------------------------------------------------------------------------------------------------- STDP


def test_stdp_with_constant_traces_of_one_is_the_original_rule():
    linear = nn.Linear(5, 3)
    weight = linear.weight.detach().clone()
    s_pre, s_post = torch.tensor([1.0, 0, 1, 1, 0]), torch.tensor([0.0, 1, 1])
    learner = layer.STDPLearner(2.0, 2.0, lambda w: -w, lambda w: 1 - w)
    # tr - tr/2 + s is 1 for tr = 2*(1 - s)
    learner.tr_pre, learner.tr_post = 2 * (1 - s_pre[None]), 2 * (1 - s_post[None])
    learner.stdp(s_pre, s_post, linear, lr=0.1)
    torch.testing.assert_close(linear.weight, weight + 0.1 * (-weight * s_pre + (1 - weight) * s_post[:, None]))
    assert torch.equal(learner.tr_pre, torch.ones(1, 5))


def test_stdp_learns_the_order_of_spikes():
    def change(first, second):
        linear = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            linear.weight.fill_(0.5)
        learner = layer.STDPLearner(3.0, 3.0, lambda w: -torch.ones_like(w), torch.ones_like)
        spike, silence = torch.ones(1, 1), torch.zeros(1, 1)
        for step in (first, second):
            learner(spike if step == "pre" else silence, spike if step == "post" else silence, linear, 0.1)
        return linear.weight.item() - 0.5

    assert change("pre", "post") == pytest.approx(0.1 * 2 / 3)  # causal: the trace of one step ago
    assert change("post", "pre") == pytest.approx(-0.1 * 2 / 3)


def test_stdp_sums_over_the_batch_and_resets():
    linear, learner = nn.Linear(2, 2), layer.STDPLearner(2.0, 2.0, torch.ones_like, torch.ones_like)
    before = linear.weight.detach().clone()
    learner.stdp(torch.ones(3, 2), torch.ones(3, 2), linear, 1.0)
    torch.testing.assert_close(linear.weight, before + 6)
    assert not linear.weight.grad_fn and linear.weight.requires_grad
    with pytest.raises(ValueError, match="reset_net"):
        learner.stdp(torch.ones(1, 2), torch.ones(1, 2), linear, 1.0)
    functional.reset_net(learner)
    learner.stdp(torch.ones(1, 2), torch.ones(1, 2), linear, 1.0)


def test_stdp_takes_linear_layers_only():
    learner = layer.STDPLearner(2.0, 2.0, torch.ones_like, torch.ones_like)
    with pytest.raises(TypeError, match=r"linear must be a torch.nn.Linear, but is a Conv2d"):
        learner.stdp(torch.ones(1, 2), torch.ones(1, 2), nn.Conv2d(1, 1, 1), 0.1)
    with pytest.raises(ValueError, match=r"\[N, 2\] and \[N, 3\], but are \[1, 4\] and \[1, 3\]"):
        learner.stdp(torch.ones(1, 4), torch.ones(1, 3), nn.Linear(2, 3), 0.1)


# ----------------------------------------------------------------------------------------------- fused, and printing


@pytest.mark.parametrize("affine", [True, False])
def test_fused_convolution_equals_conv_and_batch_norm(affine):
    block = layer.ConvBatchNorm2d(4, 6, 3, stride=2, padding=1, groups=2, affine=affine)
    x = torch.randn(2, 4, 8, 8)
    for _ in range(3):
        block(torch.randn(2, 4, 8, 8) * 2 + 1)  # running statistics worth folding
    block.eval()
    if affine:
        nn.init.normal_(block.bn.weight), nn.init.normal_(block.bn.bias)
    torch.testing.assert_close(block.get_fused_conv()(x), block(x), atol=1e-5, rtol=1e-5)
    assert block.conv.bias is None


def test_scaling_the_fused_weight_and_bias():
    block = layer.ConvBatchNorm2d(2, 3, 1)
    block(torch.randn(4, 2, 5, 5) + 1)
    nn.init.uniform_(block.bn.weight, 0.5, 2.0), nn.init.normal_(block.bn.bias)
    weight, bias = block.get_fused_weight().detach(), block.get_fused_bias().detach()
    block.scale_fused_weight(k=2.0, b=0.5)
    torch.testing.assert_close((block.get_fused_weight(), block.get_fused_bias()), (2 * weight + 0.5, bias))
    block.scale_fused_bias(k=3.0, b=-1.0)
    torch.testing.assert_close((block.get_fused_weight(), block.get_fused_bias()), (2 * weight + 0.5, 3 * bias - 1))
    block.scale_fused_weight(k=0.5)
    block.scale_fused_bias(b=1.0)
    torch.testing.assert_close((block.get_fused_weight(), block.get_fused_bias()), (weight + 0.25, 3 * bias))


def test_print_shape(capsys):
    x = torch.zeros(2, 3)
    assert layer.PrintShapeModule("after conv")(x) is x
    assert capsys.readouterr().out == "after conv (2, 3)\n"


def test_defaults():
    assert layer.SynapseFilter().tau == 100.0
    assert math.isclose(layer.NeuNorm(2, 3, 3).k0, 0.9)
    drop = layer.DropConnectLinear(2, 2)
    assert (drop.p, drop.samples_num, drop.invariant, type(drop.activation)) == (0.5, 1024, False, nn.ReLU)
