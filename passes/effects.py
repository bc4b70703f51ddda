"""What an op of a torch-level graph does beside giving its result, and clearing away what does nothing.

FX's own dead-code elimination goes by schemas, which torch-level calls have not: `counter.add_(1)`, a batch norm in training and
a dropout are pure to it. An op that nobody reads is there for its effect.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import fx

from snn_compile.ir.values import example, flat_nodes, storage_key

#: Their names end like those of writes.
OPERATORS_NAMED_LIKE_WRITES = {operator.and_, operator.or_, operator.not_}

INPLACE_OPERATORS: dict[object, Callable] = {  # type: ignore[type-arg]
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ipow: operator.pow,
}

#: How the names of functions begin that draw random numbers; all with `dropout` in theirs do, and attention may.
_RANDOM = ("rand", "normal", "bernoulli", "poisson", "multinomial", "binomial", "rrelu", "gumbel_softmax", "fractional_max_pool")


def is_grad_switch(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch._C._set_grad_enabled


def without_gradients(graph: fx.Graph) -> set[fx.Node]:
    """The nodes between a switch of gradients off and the next one."""
    found: set[fx.Node] = set()
    is_off = False
    for node in graph.nodes:
        if is_grad_switch(node):
            is_off = node.args[:1] == (False,)
        elif is_off:
            found.add(node)
    return found


def gains_gradients(node: fx.Node, passed: Iterable[fx.Node], off: set[fx.Node]) -> bool:
    """Whether `node`, taken for what it was made of, would have a gradient that it has not: some of `passed` is without."""
    return not off.isdisjoint(passed) and not off.issuperset(node.users)


def is_write(node: fx.Node) -> bool:
    """Whether the node writes into its first operand, or into what it is given as ``out=``."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.op != "call_function":
        return False
    if node.target is operator.setitem or node.target in INPLACE_OPERATORS:
        return True
    if node.target in OPERATORS_NAMED_LIKE_WRITES:
        return False
    name = getattr(node.target, "__name__", "")
    return "out" in node.kwargs or (name.endswith("_") and not name.endswith("__")) or bool(node.kwargs.get("inplace"))


def has_effect(node: fx.Node) -> bool:
    """Whether something is lost with the node where nobody reads it."""
    if node.is_impure() or is_write(node) or is_grad_switch(node) or written(node):
        return True
    if node.op == "call_module" or isinstance(node.target, torch._ops.HigherOrderOperator):
        return node.target is not torch.ops.higher_order.autograd_function_apply
    return draws(node)


def draws(node: fx.Node) -> bool:
    """Whether the node draws random numbers."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name.startswith(_RANDOM) or "dropout" in name or "attention" in name


@contextlib.contextmanager
def sweeping(graph: fx.Graph) -> Iterator[None]:
    """What a rewrite inside leaves without readers goes, and nothing else."""
    unread = {n for n in graph.nodes if not n.users}
    yield
    for node in reversed(graph.nodes):
        if not node.users and node not in unread and not has_effect(node):
            graph.erase_node(node)


def written(node: fx.Node) -> list[fx.Node]:
    """The operands a node writes into."""
    if is_write(node):
        return flat_nodes(node.kwargs["out"]) if "out" in node.kwargs else flat_nodes(node.args[:1])
    if isinstance(node.target, torch._ops.OpOverload):
        return _written_by_schema(node, node.target._schema)
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return _written_by_schema(node, node.target.default._schema) if hasattr(node.target, "default") else []
    name = getattr(node.target, "__name__", "")
    if "batch_norm" in name or "instance_norm" in name:
        # in training mode the running statistics are updated in place, though no schema says so
        if node.target is F.batch_norm and (node.args[5] if len(node.args) > 5 else node.kwargs.get("training", False)) is False:
            return []
        if node.target is F.batch_norm or node.target is F.instance_norm:
            stats = [*node.args[1:3], node.kwargs.get("running_mean"), node.kwargs.get("running_var")]
        else:
            stats = [*node.args, *node.kwargs.values()]
        return [a for a in stats if isinstance(a, fx.Node) and _is_buffer(a)]
    return []


def memory_written(node: fx.Node) -> set[int | None]:
    """The storages (`storage_key`) that a node writes into; a region may write into all it is given."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return memory_touched(node) if node.target is not torch.ops.higher_order.autograd_function_apply else set()
    if node.op != "call_module":
        return {storage_key(w) for w in written(node)} - {None}
    body = node.graph.owning_module.get_submodule(str(node.target)).body  # type: ignore[union-attr]
    return {storage_key(w) for n in body.graph.nodes for w in written(n)} - {None}  # type: ignore[union-attr]


def memory_changed(graph: fx.Graph) -> set[int | None]:
    """The storages that some node of a graph, loops apart, writes into."""
    return {key for n in graph.nodes if n.op != "call_module" for key in memory_written(n)}


def memory_touched(node: fx.Node) -> set[int | None]:
    """The storages of a node's operands and of its result."""
    return {storage_key(n) for n in (node, *node.all_input_nodes)} - {None}


def _written_by_schema(node: fx.Node, schema: torch.FunctionSchema) -> list[fx.Node]:
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    mutable = {a.name for a in schema.arguments if a.is_write}
    return [v for k, v in given.items() if k in mutable and isinstance(v, fx.Node)]


def _is_buffer(node: fx.Node) -> bool:
    value = example(node)
    return isinstance(value, torch.Tensor) and not value.requires_grad
