"""Membrane potential batch normalisation: the fold is exact, and adaptation after it follows the batch."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from snn_compile import functional, neuron

T, N, C = 5, 4, 9


def trained(dim, **kwargs):
    """A neuron whose batch norm has gamma of both signs and zeros."""
    node = neuron.MPBNLIFNode(**{"out_features" if dim == 2 else "out_channels": C}, step_mode="m", **kwargs)
    with torch.no_grad():
        node.vbn.weight.copy_(torch.randn(C) * (torch.arange(C) % 3 != 0))
        node.vbn.bias.normal_(0.8, 0.5)  # some channels of gamma == 0 always fire, some never
        node.vbn.running_mean.normal_()
        node.vbn.running_var.uniform_(0.2, 2.0)
        if node.learnable_vth:
            node.a.normal_(0.0, 0.3)
    return node.double()


def inputs(dim):
    return torch.randn(T, N, C, *[3, 2][: dim - 2], dtype=torch.float64) * 2


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("learnable_vth", [False, True])
@pytest.mark.parametrize("v_reset", [0.0, -0.4, None])
@pytest.mark.parametrize("dim", [2, 4])
def test_folded_equals_unfolded(dim, v_reset, learnable_vth, seed):
    torch.manual_seed(seed)
    unfolded = trained(dim, v_reset=v_reset, learnable_vth=learnable_vth).eval()
    folded = copy.deepcopy(unfolded)
    folded.re_parameterize_v_threshold(normalize_residual=True)
    x_seq = inputs(dim)
    s_seq = unfolded(x_seq)
    assert 0.02 < s_seq.mean() < 0.98
    assert (unfolded.vbn.weight < 0).any() and (unfolded.vbn.weight == 0).any()
    assert torch.equal(folded(x_seq), s_seq)
    torch.testing.assert_close(folded.v, unfolded.v)


@pytest.mark.parametrize("dim", [2, 4])
def test_single_steps_of_the_folded_neuron_equal_its_multi_step_call(dim):
    torch.manual_seed(0)
    multi = trained(dim)
    multi.re_parameterize_v_threshold(running_stats=True)
    single = copy.deepcopy(multi)
    functional.set_step_mode(single, "s")
    x_seq = inputs(dim)
    assert torch.equal(multi(x_seq), torch.stack([single(x) for x in x_seq]))
    torch.testing.assert_close(single.state_dict(), multi.state_dict())


def test_a_channel_of_gamma_0_is_constant_and_its_gradients_are_finite():
    node = trained(2, v_reset=None)
    with torch.no_grad():
        node.vbn.weight.zero_()
        node.vbn.bias.copy_(torch.where(torch.arange(C) < 4, 2.0, 0.0))
    node.eval().re_parameterize_v_threshold(normalize_residual=True)
    x_seq = inputs(2).requires_grad_()
    s_seq = node(x_seq)
    assert torch.equal(s_seq, (torch.arange(C) < 4).double().expand_as(s_seq))
    s_seq.sum().backward()
    for grad in (x_seq.grad, node.gamma.grad, node.beta.grad):
        assert grad.isfinite().all()


def test_without_the_residual_the_raw_potential_is_carried():
    node = neuron.MPBNLIFNode(out_features=1).eval()
    with torch.no_grad():
        node.vbn.running_mean.fill_(1.0)
    node.re_parameterize_v_threshold()
    node(torch.tensor([[1.5]]))
    assert node.v.item() == 1.5  # below the folded threshold of 2, not normalised to 0.5
    raw = neuron.MPBNLIFNode(out_features=1, v_reset=None).eval()
    with torch.no_grad():
        raw.vbn.running_mean.fill_(1.0)
    raw.re_parameterize_v_threshold()
    raw(torch.tensor([[2.5]]))
    assert raw.v.item() == pytest.approx(0.5, abs=1e-4)  # the soft reset subtracts the folded threshold


def test_gamma_and_beta_stay_trainable_and_the_learned_threshold_becomes_fixed():
    node = trained(2, learnable_vth=True)
    learned = node.a.detach().exp()
    node.re_parameterize_v_threshold(normalize_residual=True)
    assert set(dict(node.named_parameters())) == {"gamma", "beta"}
    assert torch.equal(node.v_threshold, learned)
    node(inputs(2)).sum().backward()
    assert node.gamma.grad.abs().sum() > 0 and node.beta.grad.abs().sum() > 0
    assert {"mu", "sigma2", "v_threshold"} <= set(node.state_dict())


def test_training_updates_the_running_statistics_once_a_step():
    node = neuron.MPBNLIFNode(out_features=C, step_mode="m")
    node(torch.rand(T, N, C))
    assert node.vbn.num_batches_tracked == T
    node.eval()
    node.reset()
    node(torch.rand(T, N, C))
    assert node.vbn.num_batches_tracked == T


@pytest.mark.parametrize("dim", [2, 4])
def test_adaptation_replaces_or_averages_the_statistics(dim):
    torch.manual_seed(1)
    x = inputs(dim)[0]
    over = (0,) if dim == 2 else (0, 2, 3)
    mean, variance = x.mean(over), x.var(over, correction=1)  # the first step charges h = x
    replaced, averaged = trained(dim), trained(dim, bn_momentum=0.2, bn_decay_momentum=0.5, bn_min_momentum=0.08)
    replaced.re_parameterize_v_threshold()
    averaged.re_parameterize_v_threshold(running_stats=True)
    before = averaged.mu, averaged.sigma2
    replaced(x[None]), averaged(x[None])
    torch.testing.assert_close((replaced.mu, replaced.sigma2), (mean, variance))
    torch.testing.assert_close(averaged.mu, 0.8 * before[0] + 0.2 * mean)
    torch.testing.assert_close(averaged.sigma2, 0.8 * before[1] + 0.2 * variance)
    assert averaged.momentum.item() == pytest.approx(0.1)
    averaged(x[None])
    assert averaged.momentum.item() == pytest.approx(0.08)  # not below bn_min_momentum


def test_adaptation_skips_a_batch_of_one_row_and_stops_in_eval_mode():
    node = trained(2)
    node.re_parameterize_v_threshold()
    before = node.mu.clone()
    node(inputs(2)[:, :1])
    assert torch.equal(node.mu, before)
    node.reset()
    node.eval()(inputs(2))
    assert torch.equal(node.mu, before)


def test_folding_twice_or_without_batch_norm_warns_and_does_nothing():
    node = trained(2)
    node.re_parameterize_v_threshold()
    before = copy.deepcopy(node.state_dict())
    with pytest.warns(UserWarning, match="folded already"):
        node.re_parameterize_v_threshold(normalize_residual=True)
    assert not node.normalize_residual
    torch.testing.assert_close(node.state_dict(), before)
    plain = neuron.MPBNLIFNode(out_features=C, mpbn=False)
    with pytest.warns(UserWarning, match="mpbn=False"):
        plain.re_parameterize_v_threshold()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(2).re_parameterize_v_threshold()


def test_the_soft_reset_subtracts_the_learned_threshold():
    node = neuron.MPBNLIFNode(out_features=1, v_reset=None, learnable_vth=True, mpbn=False)
    with torch.no_grad():
        node.a.fill_(torch.tensor(0.5).log())
    node(torch.tensor([[0.8]]))
    assert node.v.item() == pytest.approx(0.3)
