import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from snn_compile.lowering.lower_loops import move_numbers


def test_numbers_on_cpu_go_to_the_device_of_the_others():
    graph = fx.Graph()
    with FakeTensorMode():
        values = [torch.empty(3, 4, device="cuda"), torch.empty(()), torch.empty(4), torch.empty((), device="cuda")]
    nodes = []
    for i, value in enumerate(values):
        nodes.append(graph.placeholder(f"a{i}"))
        nodes[-1].meta["example_value"] = value
    call = graph.call_function(torch.stack, tuple(nodes))
    move_numbers(call)
    moved = call.args[1]
    assert moved.target == "to" and moved.args[0] is nodes[1] and moved.meta["example_value"].device.type == "cuda"
    assert (call.args[0], *call.args[2:]) == (nodes[0], *nodes[2:])  # a row on another device is an error in eager, too


def test_numbers_among_tensors_on_cpu_stay():
    graph = fx.Graph()
    nodes = [graph.placeholder(n) for n in "ab"]
    for node, value in zip(nodes, (torch.zeros(3), torch.zeros(())), strict=True):
        node.meta["example_value"] = value
    call = graph.call_function(torch.add, tuple(nodes))
    move_numbers(call)
    assert call.args == tuple(nodes)
