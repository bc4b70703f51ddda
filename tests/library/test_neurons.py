"""Neurons against their equations, written out once more with numbers a reader can check."""

from __future__ import annotations

import pytest
import torch

from snn_compile import neuron, surrogate


def run(node, *values):
    """Spikes and potentials of one neuron fed with `values`, one a step."""
    spikes, potentials = [], []
    for value in values:
        spikes.append(node(torch.tensor([[value]], dtype=torch.float64)).item())
        potentials.append(node.v.item())
    return spikes, pytest.approx(potentials)


def test_if_hard_and_soft():
    assert run(neuron.IFNode(), 0.6, 0.6, 0.6) == ([0, 1, 0], [0.6, 0.0, 0.6])
    assert run(neuron.IFNode(v_reset=None), 0.6, 0.6, 0.6) == ([0, 1, 0], [0.6, 0.2, 0.8])
    assert run(neuron.IFNode(v_reset=-0.5), 1.0, 1.0, 1.0) == ([0, 1, 0], [0.5, -0.5, 0.5])


def test_a_potential_at_the_threshold_fires():
    assert run(neuron.IFNode(), 1.0) == ([1], [0.0])


def test_lif_charges():
    assert run(neuron.LIFNode(tau=4.0), 2.0, 2.0) == ([0, 0], [0.5, 0.875])
    assert run(neuron.LIFNode(tau=4.0, decay_input=False), 0.5, 0.5) == ([0, 0], [0.5, 0.875])
    assert run(neuron.LIFNode(tau=4.0, v_reset=-1.0), 1.0) == ([0], [-0.75])
    assert run(neuron.LIFNode(tau=4.0, v_reset=-1.0, decay_input=False), 0.5) == ([0], [-0.5])


def test_the_charges_of_lif_keep_their_order_of_operations():
    x, v = torch.rand(2, 1000) * 2
    reset, tau = -0.3, 3.0
    for v_reset, decay_input, want in [
        (0.0, True, v + (x - v) / tau),
        (None, True, v + (x - v) / tau),
        (reset, True, v + (x - (v - reset)) / tau),
        (0.0, False, v * (1 - 1 / tau) + x),
        (None, False, v * (1 - 1 / tau) + x),
        (reset, False, v - (v - reset) / tau + x),
    ]:
        node = neuron.LIFNode(tau, decay_input, v_reset=v_reset)
        assert torch.equal(node.neuronal_charge(x, v), want)
    for decay_input, want in [(True, v + (reset - v + x) / tau), (False, v + (reset - v) / tau + x)]:
        assert torch.equal(neuron.SimpleLIFNode(tau, decay_input, v_reset=reset).neuronal_charge(x, v), want)


def test_parametric_lif_learns_its_time_constant():
    node = neuron.ParametricLIFNode(init_tau=4.0)
    assert node.tau == pytest.approx(4.0)
    assert set(dict(node.named_parameters())) == {"w"}
    assert run(node, 2.0, 2.0) == ([0, 0], [0.5, 0.875])
    node.reset()
    node(torch.full((2, 3), 2.0)).sum().backward()
    assert node.w.grad.abs() > 0


def test_cuba_lif():
    node = neuron.CUBALIFNode(c_decay=0.5, v_decay=0.75, v_threshold=0.5)
    assert run(node, 0.4, 0.0, 0.0) == ([0, 1, 0], [0.4, 0.0, 0.1])


def test_klif_rectifies_and_scales():
    assert run(neuron.KLIFNode(tau=2.0), -1.0, 1.0) == ([0, 0], [0.0, 0.5])
    node = neuron.KLIFNode(scale_reset=True, v_reset=None)
    with torch.no_grad():
        node.k.fill_(2.0)
    assert run(node, 1.5) == ([1], [0.75 - 0.5])  # h = 2*0.75, V/k = 0.5


def test_liaf_puts_out_the_activation():
    node = neuron.LIAFNode(torch.relu, True, tau=2.0, v_threshold=0.5)
    assert run(node, 2.0, 0.4) == ([0.5, 0.0], [0.0, 0.2])


def test_alif_raises_its_threshold_after_a_spike():
    node = neuron.ALIFNode(tau=2.0, rho=0.5, beta=2.0)
    assert run(node, 2.0, 2.0, 4.0) == ([1, 0, 1], [0.0, 1.0, 0.0])  # thresholds 1, 2, 1.5
    assert node.b.item() == pytest.approx(0.625)


def test_qif():
    node = neuron.QIFNode(tau=2.0, v_c=0.8, a0=1.0, v_reset=-0.1)
    h = -0.1 + (1.0 + 1.0 * (-0.1 - 0.0) * (-0.1 - 0.8)) / 2.0
    assert run(node, 1.0) == ([0], [h])


def test_eif():
    node = neuron.EIFNode()
    h = -0.1 + (1.0 + 0.0 + 0.1 + torch.tensor(-0.9).exp().item()) / 2.0
    assert run(node, 1.0) == ([0], [pytest.approx(h)])


def test_izhikevich_recovers():
    node = neuron.IzhikevichNode(a=0.5, b=0.25, tau_w=2.0, v_rest=0.0, v_threshold=0.5)
    h = 0.0 + (1.0 + 0.0 * (0.0 - 0.8) - 0.0) / 2.0
    assert run(node, 1.0) == ([1], [0.0])
    assert node.w.item() == pytest.approx(0.0 + (0.5 * h - 0.0) / 2.0 + 0.25)


def test_soft_reset_gradient_follows_detach_reset():
    grads = []
    for detach_reset in (False, True):
        x = torch.tensor([[0.6], [0.6]], requires_grad=True)
        node = neuron.IFNode(v_reset=None, detach_reset=detach_reset, step_mode="m", surrogate_function=surrogate.Rect())
        node(x.unsqueeze(1))[1].sum().backward()
        grads.append(x.grad[0].item())
    # ds1/dx0 = dv0/dx0 = 1 - g, g = 1 the surrogate's gradient at 0.6 - 1, unless the reset is detached
    assert grads == [0.0, 1.0]


def test_non_spiking_decodes():
    x_seq = torch.tensor([1.0, -3.0, 0.5]).view(3, 1, 1)
    potentials = [1.0, -2.0, -1.5]
    for decode, want in [
        (None, potentials),
        ("max-mem", [1.0]),
        ("max-abs-mem", [-2.0]),
        ("mean-mem", [-2.5 / 3]),
        ("last-mem", [-1.5]),
    ]:
        assert neuron.NonSpikingIFNode(decode)(x_seq).flatten().tolist() == pytest.approx(want)
    assert neuron.NonSpikingLIFNode(2.0)(x_seq).flatten().tolist() == pytest.approx([0.5, -1.25, -0.375])


def test_non_spiking_neurons_start_fresh_at_every_call():
    node, x_seq = neuron.NonSpikingIFNode(), torch.ones(3, 1, 1)
    assert torch.equal(node(x_seq), node(x_seq))


def test_gated_lif_keeps_the_last_spike_between_calls():
    torch.manual_seed(0)
    node, x_seq = neuron.GatedLIFNode(2), torch.full((4, 1, 1), 2.0)
    first, second = node(x_seq[:2]), node(x_seq[2:])
    assert first[-1].item() == 1.0
    node.s = torch.zeros_like(node.s)
    assert torch.equal(second[-1], torch.ones(1, 1))
    assert sum(p.numel() for p in node.parameters()) == 7 + 2


def test_masked_psn_needs_lambda_1_to_step_and_stops_after_T_steps():
    node = neuron.MaskedPSN(2, 3)
    with pytest.raises(ValueError, match=r"lambda_ must be 1 in single-step mode, but is 0.0"):
        node(torch.zeros(2, 2))
    node.lambda_ = 1.0
    for _ in range(3):
        node(torch.zeros(2, 2))
    with pytest.raises(OverflowError, match="T = 3 steps"):
        node(torch.zeros(2, 2))
    node.reset()
    node(torch.zeros(2, 2))


def test_psn_starts_with_a_window_of_halves():
    assert neuron.SlidingPSN(4).weight.tolist() == [0.125, 0.25, 0.5, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("make", [neuron.LIFNode, neuron.ParametricLIFNode, neuron.KLIFNode, neuron.CUBALIFNode])
def test_the_dtype_of_the_input_is_kept(make, dtype):
    node = make(step_mode="m")
    x_seq = torch.ones(3, 2, 2, dtype=dtype)
    assert node(x_seq).dtype == node.v.dtype == dtype
    assert node(x_seq).dtype == dtype


def test_float32_neurons_take_low_precision_inputs():
    x_seq = torch.rand(3, 4, 5).to(torch.bfloat16)
    folded = neuron.MPBNLIFNode(out_features=5, learnable_vth=True, step_mode="m")
    for node in (folded, neuron.GatedLIFNode(3)):
        assert node(x_seq).dtype == torch.bfloat16
        assert node(x_seq).dtype == torch.bfloat16
    folded.re_parameterize_v_threshold(True)
    assert folded(x_seq).dtype == folded.v.dtype == torch.bfloat16


def test_repr_names_the_parameters():
    assert "tau=2.0, decay_input=True, v_threshold=1.0, v_reset=0.0" in repr(neuron.LIFNode())
    assert "Sigmoid(alpha=4.0, spiking=True)" in repr(neuron.LIFNode())
