"""Inter-layer connection neurons: the spikes of a step reach the next one, and the caller's input stays as it is."""

from __future__ import annotations

import pytest
import torch

from snn_compile import neuron, surrogate

NODES = [neuron.ILCIFNode, neuron.ILCLIFNode, neuron.ILCCUBALIFNode]


@pytest.mark.parametrize("v_reset", [0.0, -0.2, None])
@pytest.mark.parametrize("make", NODES)
def test_equation(make, v_reset):
    torch.manual_seed(0)
    act_dim, population, T, N = 3, 4, 5, 2
    node = make(act_dim, population, v_reset=v_reset)
    x_seq = torch.rand(T, N, act_dim * population) * 2
    v = torch.full((N, act_dim * population), v_reset or 0.0)
    c = torch.zeros_like(v)
    fed, want = x_seq.clone(), []
    for t in range(T):
        if make is neuron.ILCIFNode:
            h = v + fed[t]
        elif make is neuron.ILCLIFNode:
            h = v * 0.75 + fed[t]
        else:
            c = c * 0.5 + fed[t]
            h = v * 0.75 + c
        s = (h >= node.v_threshold).float()
        v = h - s * node.v_threshold if v_reset is None else s * v_reset + (1 - s) * h
        want.append(s)
        if t + 1 < T:
            fed[t + 1] += node.conn(s.view(N, act_dim, population)).view(N, -1).detach()
    assert torch.equal(node(x_seq), torch.stack(want))


@pytest.mark.parametrize("make", NODES)
def test_the_input_is_not_modified(make):
    x_seq = torch.rand(4, 2, 6)
    before = x_seq.clone()
    make(2, 3)(x_seq)
    assert torch.equal(x_seq, before)
    make(2, 3)(x_seq.requires_grad_()).sum().backward()  # a leaf can be an input
    assert x_seq.grad is not None


@pytest.mark.parametrize("make", NODES)
def test_soft_reset_starts_from_zero(make):
    node = make(2, 3, v_reset=None)
    assert not node(torch.zeros(1, 2, 6)).any()


@pytest.mark.parametrize("make", NODES)
def test_every_call_starts_fresh(make):
    node, x_seq = make(2, 3), torch.rand(4, 2, 6)
    assert torch.equal(node(x_seq), node(x_seq))


def test_the_spikes_of_one_population_stay_in_it():
    node = neuron.ILCIFNode(2, 3, surrogate_function=surrogate.Sigmoid())
    x_seq = torch.zeros(2, 1, 6, requires_grad=True)
    node(x_seq)[1, 0, :3].sum().backward()
    assert x_seq.grad[0, 0, :3].all() and not x_seq.grad[0, 0, 3:].any()
