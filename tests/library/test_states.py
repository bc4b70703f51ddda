"""States persist between calls until reset; they are no parameters, and copies, pickles and `.to` carry them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from snn_compile import functional, layer, neuron
from tests.library.modules import STATEFUL, C, N, T, states

DETERMINISTIC = [case for case in STATEFUL if not case.name.startswith("Drop")]


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_two_calls_continue_one_sequence(case):
    once = case.make("m").eval()  # the running statistics of a batch norm stay
    twice = copy.deepcopy(once)
    x_seq = case.inputs(2 * T)
    y = torch.cat([twice(x_seq[:T]), twice(x_seq[T:])])
    assert torch.equal(once(x_seq), y)
    for a, b in zip(states(once).values(), states(twice).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_single_steps_equal_the_multi_step_call(case):
    multi = case.make("m")
    single = copy.deepcopy(multi)
    functional.set_step_mode(single, "s")
    x_seq = case.inputs()
    assert torch.equal(multi(x_seq), torch.stack([single(x) for x in x_seq]))
    for a, b in zip(states(multi).values(), states(single).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_reset_starts_a_new_sequence(case):
    module = case.make("m").train(case.name.startswith("Drop"))
    x_seq = case.inputs()
    torch.manual_seed(0)
    first = module(x_seq)
    functional.reset_net(module)
    assert not states(module)
    torch.manual_seed(0)
    assert torch.equal(first, module(x_seq))


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_states_are_not_in_the_state_dict(case):
    module = case.make("m")
    before = set(module.state_dict())
    module(case.inputs())
    assert states(module)
    assert set(module.state_dict()) == before


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_copies_and_pickles_carry_the_states(case):
    module = case.make("m")
    module(case.inputs().requires_grad_())  # the states hang on an autograd graph
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    others.append(torch.load(buffer, weights_only=False))
    x_seq = case.inputs(seed=3)
    torch.manual_seed(0)
    want = copy.deepcopy(module)(x_seq)
    for other in others:
        assert states(other).keys() == states(module).keys()
        assert not any(value.requires_grad for value in states(other).values())
        torch.manual_seed(0)
        assert torch.equal(other(x_seq), want)


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_to_moves_the_states(case):
    module = case.make("m")
    module(case.inputs())
    module.to(torch.float64)
    for value in states(module).values():
        assert value.dtype in (torch.float64, torch.bool)
    assert module(case.inputs(dtype=torch.float64)).dtype == torch.float64
    module.to("meta")
    assert {value.device.type for value in states(module).values()} == {"meta"}


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_detach_net_cuts_the_graph_and_keeps_the_values(case):
    module = case.make("m")
    module(case.inputs().requires_grad_())
    before = {name: value.clone() for name, value in states(module).items()}
    functional.detach_net(module)
    for name, value in states(module).items():
        assert not value.requires_grad
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_another_input_than_the_states_raises(case):
    module = case.make("m")
    module(case.inputs())
    with pytest.raises(ValueError, match="reset_net") as error:
        module(case.inputs()[:, :1])
    assert f"[{N}, " in str(error.value)
    assert "[1, " in str(error.value)
    if case.name != "LinearRecurrentContainer":
        with pytest.raises((ValueError, RuntimeError), match=r"float32 .*float64|reset_net"):
            module(case.inputs(dtype=torch.float64))


@pytest.mark.parametrize("name", ["Dropout", "Dropout2d", "DropConnectLinear"])
def test_another_input_than_the_masks_raises(name):
    case = next(case for case in STATEFUL if case.name == name)
    module = case.make("m")
    module(case.inputs())
    with pytest.raises(ValueError, match="reset_net"):
        module(case.inputs()[:, :1])


def test_the_state_starts_from_v_reset():
    assert neuron.IFNode(v_reset=-0.5).v == -0.5
    assert neuron.IFNode(v_reset=None).v == 0.0
    node = neuron.IFNode(v_reset=-0.5)
    node(torch.tensor([[0.25]]))
    assert torch.equal(node.v, torch.tensor([[-0.25]]))


def test_store_v_seq_holds_the_potential_after_each_reset():
    node = neuron.LIFNode(step_mode="m", store_v_seq=True)
    x_seq = torch.rand(T, N, C) * 3
    s_seq = node(x_seq)
    single, v_seq = neuron.LIFNode(), []
    for x in x_seq:
        single(x)
        v_seq.append(single.v)
    assert torch.equal(node.v_seq, torch.stack(v_seq))
    assert not node.v_seq[s_seq == 1].any()
    node.reset()
    assert node.v_seq is None


def test_set_step_mode_reaches_every_module_but_those_in_containers():
    inner = neuron.LIFNode()
    net = nn.Sequential(nn.Linear(2, 2), neuron.LIFNode(), nn.Sequential(neuron.IFNode()), layer.MultiStepContainer(inner))
    functional.set_step_mode(net, "m")
    assert net[1].step_mode == net[2][0].step_mode == "m"
    assert inner.step_mode == "s"
    recurrent = layer.LinearRecurrentContainer(neuron.LIFNode(), 2, 2)
    functional.set_step_mode(recurrent, "m")
    assert (recurrent.step_mode, recurrent.sub_module.step_mode) == ("m", "s")


def test_set_step_mode_names_what_cannot_be_set():
    with pytest.raises(ValueError, match=r"NonSpikingLIFNode: step_mode must be one of 'm', but is 's'"):
        functional.set_step_mode(nn.Sequential(neuron.NonSpikingLIFNode()), "s")
    with pytest.raises(ValueError, match=r"step_mode must be one of 's', 'm', but is 'x'"):
        functional.set_step_mode(nn.Sequential(), "x")
    with pytest.raises(ValueError, match=r"step_mode must be one of 's', 'm', but is 'x'"):
        neuron.LIFNode(step_mode="x")


def test_reset_net_reaches_nested_modules():
    net = nn.Sequential(neuron.LIFNode(), nn.ModuleDict({"a": neuron.IFNode()})["a"], layer.SynapseFilter())
    net(torch.rand(2, 3))
    assert len(states(net)) == 3
    functional.reset_net(net)
    assert not states(net)


def test_a_training_loop_over_segments():
    node, linear = neuron.LIFNode(step_mode="m"), nn.Linear(C, C)
    for x_seq in torch.rand(3, T, N, C):
        node(linear(x_seq)).sum().backward()
        functional.detach_net(node)
    assert linear.weight.grad.abs().sum() > 0
