"""The tempotron: its kernel, its three outputs, and that it learns which pattern of spike times is which."""

from __future__ import annotations

import pytest
import torch

from snn_compile.tempotron import Tempotron


def one_input(T=40, **kwargs):
    tempotron = Tempotron(1, 1, T, **kwargs)
    torch.nn.init.constant_(tempotron.fc.weight, 1.0)
    return tempotron


@pytest.mark.parametrize("v_threshold", [1.0, 2.5])
def test_the_kernel_peaks_at_the_threshold(v_threshold):
    tempotron = one_input(v_threshold=v_threshold)
    t = torch.linspace(0, 100, 100_001)
    k = tempotron.psp_kernel(t)
    assert k.max().item() == pytest.approx(v_threshold, rel=1e-5)
    assert tempotron.psp_kernel(torch.tensor([-5.0, 0.0])).tolist() == [0.0, 0.0]


def test_outputs():
    tempotron = Tempotron(3, 2, 30)
    times = torch.tensor([[1.0, 5.0, -1.0], [20.0, 0.0, 3.0]])
    v = tempotron(times, "v")
    t = torch.arange(30.0)
    want = sum(tempotron.fc.weight[1, i] * tempotron.psp_kernel(t - times[0, i]) for i in (0, 1))
    torch.testing.assert_close(v[0, 1], want)
    assert v.shape == (2, 2, 30)
    torch.testing.assert_close(tempotron(times, "v_max"), v.max(-1).values)
    assert tempotron(times, "spikes").shape == (2, 2)


def test_a_batch_of_one_keeps_its_dimension():
    tempotron = Tempotron(3, 2, 30)
    shapes = [tuple(tempotron(torch.rand(1, 3) * 30, ret_type).shape) for ret_type in ("v", "v_max", "spikes")]
    assert shapes == [(1, 2, 30), (1, 2), (1, 2)]


def test_firing_times():
    tempotron = one_input(v_threshold=0.5)
    # a spike; none; one too late to reach the threshold. At whole steps the kernel just misses its peak: weight 2.
    torch.nn.init.constant_(tempotron.fc.weight, 2.0)
    times = torch.tensor([[10.0], [-1.0], [39.0]], requires_grad=True)
    spikes = tempotron(times, "spikes")
    peak = tempotron.psp_kernel(torch.arange(40.0)).argmax().item()
    assert spikes.flatten().tolist() == [10.0 + peak, -1.0, -1.0]
    spikes.sum().backward()
    assert tempotron.fc.weight.grad.isfinite().all()
    assert times.grad[0].item() > 0  # a later input fires the neuron later


def test_long_sequences_do_not_overflow():
    assert Tempotron(1, 1, 2000)(torch.tensor([[1999.0]]), "v").isfinite().all()


def test_unknown_ret_type_names_the_three():
    with pytest.raises(ValueError, match=r"ret_type must be one of 'v', 'v_max', 'spikes', but is 'peak'"):
        Tempotron(1, 1, 5)(torch.zeros(1, 1), "peak")
    with pytest.raises(ValueError, match=r"times must be \[N, in_features = 2\], but is \[3\]"):
        Tempotron(2, 1, 5)(torch.zeros(3), "v")


def test_mse_loss_counts_only_what_is_wrong():
    v_max = torch.tensor([[1.5, 1.2], [0.4, 0.3]])
    loss = Tempotron.mse_loss(v_max, 1.0, torch.tensor([0, 1]), 2)
    assert loss.item() == pytest.approx((0.2**2 + 0.7**2) / 2)


def test_it_learns_spike_timing():
    """Two classes of the same inputs in another order; rates cannot tell them apart."""
    torch.manual_seed(0)
    inputs, T = 20, 60
    prototypes = torch.rand(2, inputs) * T * 0.7
    label = torch.arange(40) % 2
    times = (prototypes[label] + torch.randn(40, inputs)).clamp(0, T - 1)
    tempotron = Tempotron(inputs, 2, T)
    optimizer = torch.optim.Adam(tempotron.parameters(), lr=0.05)

    def accuracy():
        return (tempotron(times, "v_max").argmax(1) == label).float().mean().item()

    for _ in range(60):
        optimizer.zero_grad()
        Tempotron.mse_loss(tempotron(times, "v_max"), tempotron.v_threshold, label, 2).backward()
        optimizer.step()
    assert accuracy() > 0.95
    fired = tempotron(times, "spikes") >= 0
    assert (fired == torch.nn.functional.one_hot(label, 2).bool()).float().mean() > 0.9
