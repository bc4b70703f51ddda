"""New nodes of a torch-level graph, with the examples that passes read."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from snn_compile.errors import VerificationError
from snn_compile.ir.loop import Loop
from snn_compile.ir.values import example, flat_nodes, size_key
from snn_compile.passes.autocast_regions import Regions, put_into, regions, under


def emit(  # type: ignore[no-untyped-def]
    graph: fx.Graph, op: str, target, args, kwargs, name: str | None = None, where: Regions = ()
) -> fx.Node:
    """A node with its example, found by running it on the examples of its operands, in these regions of autocast."""
    node = graph.create_node(op, target, args, kwargs, name)
    node.meta["example_value"] = _run(op, target, args, kwargs, where)
    put_into(node, where)
    return node


def behind(node: fx.Node) -> fx.Node:
    """The first op behind a node's definition: what is put before it can read the node, and all ops behind can read that."""
    following = node.next
    while following.op in ("placeholder", "get_attr"):
        following = following.next
    return following


def number_of_steps(call: fx.Node, loop: Loop) -> int | fx.Node:
    """The length of a loop as an operand of an op before `call`."""
    return size_before(call, loop.length)


def size_before(call: fx.Node, size: int | torch.SymInt) -> int | fx.Node:
    """A size as an operand of an op before `call`: where it is symbolic, the size that it is in the graph."""
    if isinstance(size, int):
        return size
    wanted = size_key(size)
    for node in itertools.takewhile(lambda n: n is not call, call.graph.nodes):
        value = example(node)
        if isinstance(value, torch.SymInt) and size_key(value) == wanted:
            return node
        if isinstance(value, Tensor) and wanted in (sizes := [size_key(s) for s in value.shape]):
            with call.graph.inserting_before(call):
                return emit(call.graph, "call_method", "size", (node, sizes.index(wanted)), {})
    raise VerificationError(f"no value before {call.name} has the size {wanted}")


def attribute(gm: fx.GraphModule, loop: Loop, node: fx.Node) -> fx.Node:
    """The `get_attr` node of a loop's body, with what it names, in the graph that holds the loop."""
    name = f"{loop.name}_{node.target}"
    if not hasattr(gm, name):
        gm.add_submodule(name, getattr(loop.body, str(node.target)))
    new = gm.graph.get_attr(name)
    new.meta["example_value"] = getattr(gm, name)
    return new


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """To be rewritten while the original stays as it is."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def delete_unused_children(gm: fx.GraphModule) -> None:
    """Not `delete_all_unused_submodules`, which empties the bodies of regions: their own children are named in no node here."""
    used = {str(n.target).split(".")[0] for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    for name in [name for name, _ in gm.named_children() if name not in used]:
        gm.delete_submodule(name)


def replace_by_results(node: fx.Node, results: Sequence[fx.Node]) -> None:
    """A node of several results goes: ``getitem(node, i)`` becomes ``results[i]``."""
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def emit_copy(graph: fx.Graph, node: fx.Node, like: Tensor) -> fx.Node:
    """The value in memory of its own, contiguous where `like` is."""
    memory_format = {"memory_format": torch.contiguous_format} if like.is_contiguous() else {}
    return emit(graph, "call_method", "clone", (node,), memory_format)


def emit_function(  # type: ignore[no-untyped-def]
    graph: fx.Graph, function: Callable[..., fx.Proxy], args, kwargs, where: Regions = ()
) -> fx.Node:
    """The nodes of a function in plain PyTorch, with their examples, in these regions of autocast."""
    before = set(graph.nodes)
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = fx.node.map_arg((args, kwargs), lambda n: fx.Proxy(n, tracer))  # type: ignore[arg-type,return-value]
    result = function(*proxies[0], **proxies[1])
    for new in (n for n in graph.nodes if n not in before):
        new.meta["example_value"] = _run(new.op, new.target, new.args, new.kwargs, where)
        put_into(new, where)
    node: fx.Node = result.node
    return node


def evaluate(node: fx.Node) -> object:
    """What a node gives on the examples of its operands."""
    return _run(node.op, node.target, node.args, node.kwargs, regions(node))


def fake_mode_of(operands: object) -> contextlib.AbstractContextManager[object]:
    """The mode in which to run ops on the examples of nodes."""
    fakes = [v for v in map(example, flat_nodes(operands)) if isinstance(v, FakeTensor)]
    return fakes[0].fake_mode if fakes else contextlib.nullcontext()


def _run(op: str, target, args, kwargs, where: Regions) -> object:  # type: ignore[no-untyped-def]
    (first, *rest), keywords = fx.node.map_arg((args, kwargs), example)
    with fake_mode_of((args, kwargs)), under(where):
        return getattr(first, target)(*rest, **keywords) if op == "call_method" else target(first, *rest, **keywords)
