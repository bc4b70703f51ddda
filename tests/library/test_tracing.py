"""Every module traces into one graph; the compiled call leaves the outputs, gradients and states that eager leaves."""

from __future__ import annotations

import copy

import pytest
import torch

from snn_compile import neuron, surrogate
from tests.library.modules import MULTI_STEP, STATEFUL, T, states


def _compile(function):
    return torch.compile(function, backend="eager", fullgraph=True)


def _run(module, call, x_seqs):
    """Outputs, input gradients and states after the calls, on the module as it is."""
    torch.manual_seed(0)  # modules that draw random numbers draw the same ones
    found = []
    for x_seq in x_seqs:
        x_seq = x_seq.clone().requires_grad_()
        y = call(x_seq)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward(retain_graph=True)
        found += [y, x_seq.grad]
    return [f.detach().clone() for f in (*found, *states(module).values())]


def _check_equal(module, reference, call, reference_call, x_seqs):
    got = _run(module, _compile(call), x_seqs)
    torch.testing.assert_close(got, _run(reference, reference_call, x_seqs), rtol=0, atol=0)
    assert states(module).keys() == states(reference).keys()


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize("case", [*STATEFUL, *MULTI_STEP], ids=str)
def test_multi_step_call_is_one_graph(case):
    module = case.make("m")
    reference = copy.deepcopy(module)
    # the second call continues from the states that the compiled first call left
    _check_equal(module, reference, module, reference, [case.inputs(seed=1), case.inputs(seed=2)])


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_single_steps_in_a_loop_are_one_graph(case):
    module = case.make("s")
    reference = copy.deepcopy(module)

    def loop(module):
        return lambda x_seq: torch.stack([module(x) for x in x_seq.unbind(0)])

    _check_equal(module, reference, loop(module), loop(reference), [case.inputs(seed=1)])


def test_each_surrogate_call_is_one_node():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    node = neuron.LIFNode(step_mode="m", surrogate_function=surrogate.ATan(alpha=3.0))
    torch.compile(node, backend=backend, fullgraph=True)(torch.randn(T, 2, requires_grad=True))
    calls = [n for n in graphs[0].graph.nodes if n.target is surrogate.ATan.spiking_function]
    assert len(calls) == T
    assert {n.args[1:] for n in calls} == {(3.0,)}


def test_every_step_traces_to_the_same_operations():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    node = neuron.LIFNode(step_mode="m", v_reset=-0.1)
    torch.compile(node, backend=backend, fullgraph=True)(torch.randn(T, 2))
    targets = [n.target for n in graphs[0].graph.nodes if n.op in ("call_function", "call_method")]
    spike = surrogate.Sigmoid.spiking_function
    first, second, third = (i for i, target in enumerate(targets) if target is spike and targets[i:].count(spike) > 1)
    assert targets[first:second] == targets[second:third]


def test_store_v_seq_traces():
    node = neuron.LIFNode(step_mode="m", store_v_seq=True)
    s_seq = _compile(node)(torch.randn(T, 2))
    assert node.v_seq.shape == s_seq.shape
    assert torch.equal(node.v_seq[-1], node.v)
