"""Writes into loop-local tensors become values.

    out = torch.empty(T, N)                 out = torch.empty(T, N)
    out[0] = s0                             out_1 = store(out, 0, s0)
    acc += s0                     ->        acc_1 = acc + s0               also of `acc.to(x.device)`, where it is there already
    v[spiked] = 0.0                         v_1 = v.masked_fill(spiked, 0.0)
    select_scatter(out, s0, 0, 0)           store(out, 0, s0)

A write is rewritten only where the tensor was made in this graph (it shares no storage with an input), the write goes to
the tensor itself and not through a view or ``out=``, and no view of it made earlier is read later: then every later use can
be given the new value and nobody can see the difference. (What was written is read back without memory by
`passes/unwrap_steps`.) All other writes stay as they are. The forward of an `autograd.Function` is a graph of its own:
``out = zeros_like(u); out[u > 0] = 1`` is rewritten there.

Does not fire: writes into inputs (running statistics), through views, under ``out=``; in `no_grad` regions that are none after
`passes/no_grad_regions`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from snn_compile.ir.values import example, flat_nodes, is_getitem, known_int, storage_key
from snn_compile.passes.classify import AUTOGRAD_FUNCTION
from snn_compile.passes.concatenations import normalize_concatenations
from snn_compile.passes.effects import INPLACE_OPERATORS, is_write, written
from snn_compile.passes.emit import copy_of, emit
from snn_compile.passes.no_grad_regions import detach_no_grad_regions
from snn_compile.passes.parts import index_along
from snn_compile.passes.reshapes_in_place import date_example, nodes_reshaped

#: In a node's meta: it is what a write has become, a new value. (Its example lies in the memory that was written into.)
VALUE_AFTER_WRITE = "value_after_write"


def store(buffer: torch.Tensor, index: object, value: object) -> torch.Tensor:
    """``buffer`` with ``buffer[index] = value``, as a new value."""
    result = buffer.clone()
    result[index] = value  # type: ignore[index]
    return result


def functionalize(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite `gm` in place; see the module's docstring."""
    _gather_attributes(gm.graph)
    _drop_idle_conversions(gm.graph)
    detach_no_grad_regions(gm)
    _rewrite_forwards(gm)
    _name_stores(gm.graph)
    _replace_writes(gm.graph)
    normalize_concatenations(gm.graph)
    return gm


def _gather_attributes(graph: fx.Graph) -> None:
    """`get_attr` nodes move to the front: they are operands, not part of an iteration."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    anchor = placeholders[-1] if placeholders else None
    for node in list(graph.nodes):
        if node.op == "get_attr":
            if anchor is None:
                first = next(iter(graph.nodes))
                if first is not node:
                    first.prepend(node)
            else:
                anchor.append(node)
            anchor = node


#: Methods that give the tensor itself where it is already as they would make it.
_CONVERSIONS = {"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "cpu", "cuda"}


def _drop_idle_conversions(graph: fx.Graph) -> None:
    """``torch.tensor(0.0).to(x.device) -> torch.tensor(0.0)``: a write into the one is a write into the other."""
    for node in graph.nodes:
        if node.op != "call_method" or node.target not in _CONVERSIONS:
            continue
        if storage_key(node) is not None and storage_key(node) == storage_key(node.args[0]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


# --------------------------------------------------------------------------------------------------------------- writes

_SCATTER = ("select_scatter", torch.select_scatter)


def _rewrite_forwards(gm: fx.GraphModule) -> None:
    """A surrogate that fills in its spikes, ``out = zeros_like(u); out[u > 0] = 1``, in a copy of its body."""
    for node in gm.graph.find_nodes(op="call_function", target=AUTOGRAD_FUNCTION):
        name = str(node.args[0].target)
        forward = getattr(gm, name)
        if any(map(is_write, forward.graph.nodes)):
            forward = copy_of(forward)
            _replace_writes(forward.graph)
            forward.recompile()
            setattr(gm, name, forward)


def _name_stores(graph: fx.Graph) -> None:
    """``select_scatter(b, s, 1, t) -> store(b, (slice(None), t), s)``, where `b` is no input, whose memory a store may take."""
    inputs = {storage_key(n) for n in graph.nodes if n.op in ("placeholder", "get_attr")}
    for node in list(graph.nodes):
        if node.target not in _SCATTER or len(node.args) != 4 or storage_key(node.args[0]) in inputs:
            continue
        buffer, value, dim, at = node.args
        held = example(buffer)
        if isinstance(held, torch.Tensor) and type(dim) is int and type(at) is int:
            with graph.inserting_before(node):
                new = graph.call_function(store, (buffer, index_along(dim % held.dim(), at), value))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def _replace_writes(graph: fx.Graph) -> None:
    order = {n: i for i, n in enumerate(graph.nodes)}
    memory = {n: key for n in graph.nodes if (key := storage_key(n)) is not None}
    aliases: dict[int, list[fx.Node]] = {}
    for n, key in memory.items():
        aliases.setdefault(key, []).append(n)
    local = {key: _is_local(nodes, order) for key, nodes in aliases.items()}
    #: the names of a tensor: those that are no views of a part of it
    names = {key: [n for n in nodes if not _is_view(n)] for key, nodes in aliases.items()}
    reshaped = nodes_reshaped(graph)
    current: dict[fx.Node, fx.Node] = {}  # a tensor that was written into -> its value now
    for node in list(graph.nodes):
        if current:
            node.args = fx.node.map_arg(node.args, lambda n: current.get(n, n))
            node.kwargs = fx.node.map_arg(node.kwargs, lambda n: current.get(n, n))
        if node in reshaped and local.get(memory[node]):
            date_example(node)
        if not is_write(node) or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        target = node.args[0]
        key = memory.get(target)
        if key is None or not local.get(key):
            continue
        new = _functional(graph, node)
        if new is None:
            local[key] = False
            continue
        new.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
        after = example(node) if isinstance(example(node), torch.Tensor) else example(target)
        new.meta["example_value"] = _alias(after, _requires_grad(node))  # type: ignore[arg-type]
        new.meta[VALUE_AFTER_WRITE] = True
        memory[new], order[new] = key, order[node]
        for same in names[key]:
            if order[same] <= order[node]:
                current[same] = new
        names[key].append(new)
        current[node] = new
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _requires_grad(node: fx.Node) -> bool:
    values = [example(a) for a in flat_nodes((node.args, node.kwargs))]
    return any(isinstance(v, torch.Tensor) and v.requires_grad for v in values)


def _alias(value: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """The example of a value after a write: views of it that come later have examples in the memory that was written into."""
    alias = value.detach()
    return alias.requires_grad_(requires_grad) if alias.dtype.is_floating_point else alias


def _is_view(node: fx.Node) -> bool:
    """Aliases another node without being the result of a write into it."""
    return not is_write(node) and is_alias(node)


def is_alias(node: fx.Node) -> bool:
    """Whether the node's value lies in the memory of one of its operands."""
    key, operands = storage_key(node), node.all_input_nodes
    if is_getitem(node) and isinstance(example(operands[0]), (tuple, list)):  # (a piece of a `chunk`)
        operands = operands[0].all_input_nodes
    return key is not None and VALUE_AFTER_WRITE not in node.meta and any(storage_key(i) == key for i in operands)


def _is_local(nodes: list[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Made in this graph, written only directly, and every view of it dead before the next write."""
    if any(n.op != "call_function" and n.op != "call_method" for n in nodes):
        return False
    writes: list[fx.Node] = []
    same: set[fx.Node] = {n for n in nodes if not _is_view(n)}
    for n in nodes:
        writes += [u for u in n.users if is_write(u) and n in written(u)]
    if not writes:
        return True
    if any("out" in w.kwargs or w.args[0] not in same for w in writes):
        return False
    for view in (n for n in nodes if n not in same):
        last_use = max((order[u] for u in view.users), default=order[view])
        if any(order[view] < order[w] < last_use for w in writes):
            return False
        # the write itself may read the view (v += v[0] is rare but real): it reads before it writes
        if any(u.op == "output" for u in view.users) and any(order[view] < order[w] for w in writes):
            return False
    return True


def _functional(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    target = node.args[0]
    value = example(target)
    if not isinstance(target, fx.Node) or not isinstance(value, torch.Tensor):
        return None
    with graph.inserting_before(node):
        if node.target is operator.setitem or node.target == "__setitem__":
            return _functional_setitem(graph, target, node.args[1], node.args[2])
        if node.target in INPLACE_OPERATORS:
            new = graph.call_function(INPLACE_OPERATORS[node.target], node.args)  # type: ignore[index]
        elif node.op == "call_method":
            name = str(node.target)[:-1]
            if name == "zero":
                return graph.call_function(torch.zeros_like, (target,))
            if name == "fill" and len(node.args) == 2 and not isinstance(node.args[1], fx.Node):
                return graph.call_function(torch.full_like, node.args)
            if name == "fill" and len(node.args) == 2:
                return _functional_fill(graph, node, value)
            if name == "copy":
                return _functional_copy(graph, node, value)
            if not hasattr(torch.Tensor, name):
                return None
            new = graph.call_method(name, node.args, node.kwargs)
        elif (twin := _out_of_place(node)) is not None:
            kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
            new = graph.call_function(twin, node.args, kwargs)
        else:
            return None
        return _keep_type(graph, node, new, value)


def _functional_copy(graph: fx.Graph, node: fx.Node, value: torch.Tensor) -> fx.Node | None:
    new = example(node.args[1]) if len(node.args) == 2 else None
    if not isinstance(new, torch.Tensor) or (new.shape, new.device) != (value.shape, value.device):
        return None
    if new.dtype == value.dtype:
        return graph.call_method("clone", node.args[1:])
    return None if new.dtype.is_complex else graph.call_method("to", (node.args[1], value.dtype))


def _functional_fill(graph: fx.Graph, node: fx.Node, value: torch.Tensor) -> fx.Node:
    """``torch.full(shape, tensor)`` is ``torch.empty(shape).fill_(tensor)`` to Dynamo."""
    one = emit(graph, "call_method", "to", (node.args[1], value.device, value.dtype), {})
    sizes = [known_int(s) for s in value.shape]
    target, args = ("expand_as", (one, node.args[0])) if None in sizes else ("expand", (one, *sizes))
    return graph.call_method("clone", (emit(graph, "call_method", target, args, {}),))


def _out_of_place(node: fx.Node) -> Callable | None:  # type: ignore[type-arg]
    """``torch.sigmoid_ -> torch.sigmoid``; a function that takes ``inplace=True`` is its own twin without it."""
    if "out" in node.kwargs or not callable(node.target):
        return None
    if node.kwargs.get("inplace"):
        return node.target
    name = getattr(node.target, "__name__", "")
    twins = (getattr(home, name.removesuffix("_"), None) for home in (torch, torch.nn.functional))
    return next(filter(callable, twins), None) if name.endswith("_") else None


def _keep_type(graph: fx.Graph, node: fx.Node, new: fx.Node, value: torch.Tensor) -> fx.Node | None:
    """An in-place op keeps dtype and shape of what it writes into; its functional twin promotes."""
    operands = [example(a) if isinstance(a, fx.Node) else a for a in node.args]
    tensors = [o for o in operands if isinstance(o, torch.Tensor)]
    shapes = [tuple(t.shape) for t in tensors[1:]]
    if any(len(s) > value.dim() for s in shapes):
        graph.erase_node(new)
        return None
    try:
        promoted = torch.result_type(*operands[:2]) if len(operands) == 2 else value.dtype  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        graph.erase_node(new)
        return None
    if node.target is operator.itruediv and not promoted.is_floating_point:
        promoted = torch.get_default_dtype()
    return new if promoted == value.dtype else graph.call_method("to", (new, value.dtype))


def _functional_setitem(graph: fx.Graph, target: fx.Node, index: object, value: object) -> fx.Node | None:
    mask, whole = example(index), example(target)
    if isinstance(index, fx.Node):
        scalar = not isinstance(value, fx.Node) or getattr(example(value), "ndim", 1) == 0
        same_shape = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.shape == whole.shape  # type: ignore[union-attr]
        return graph.call_method("masked_fill", (target, index, value)) if same_shape and scalar else None
    if any(True for _ in flat_nodes(index)):
        return None
    return graph.call_function(store, (target, index, value))
