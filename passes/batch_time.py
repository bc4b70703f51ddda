"""A loop without a recurrence runs once over all steps (time batching).

    for t: y[t] = conv2d(x[t], w)      ->      y = conv2d(x.flatten(0, 1), w).unflatten(0, (T, -1))

Time is folded into the batch dim, as a person would write it, so the graph holds the one large matmul or convolution. That
is sound for ops that treat dim 0 of their input as a batch of independent samples; `RULES` lists them with what must hold.
Everything else stays per step.

The folded op computes the same sums, but a BLAS or convolution library may add them in another order for another batch
size: results agree to rounding, not bit for bit. ``options={"batch_time": False}`` keeps the layers per step.

Batch norm in training mode keeps its statistics per step (`passes/batch_norm_over_time`). Dropout and other random ops draw
the numbers of all steps at once: the same distribution, another order than eager's.

Does not fire: other ops that write, a parameter with a batch dim of its own, reversed time, ops with no rule.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx

from snn_compile.errors import Reject
from snn_compile.ir.loop import Loop
from snn_compile.ir.values import example
from snn_compile.passes.batch_norm_over_time import batch_norm_over_time, check_batch_norm
from snn_compile.passes.classify import OpInfo
from snn_compile.passes.emit import emit, emit_function

#: Says whether the node treats dim 0 of its first operand as a batch; the other operands are constants of the loop.
Rule = Callable[[fx.Node], bool]


def _argument(node: fx.Node, position: int, name: str, default: object) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _has_batch(spatial: int) -> Rule:
    """Convolution and pooling also take an input without a batch dim; then dim 0 is the channel."""
    return lambda node: _dim(node) == spatial + 2


def _dim(node: fx.Node) -> int:
    value = example(node.args[0]) if node.args else None
    return value.dim() if isinstance(value, torch.Tensor) else -1


def _flattens_behind_batch(node: fx.Node) -> bool:
    start = _argument(node, 1, "start_dim", 0)
    return isinstance(start, int) and start % max(_dim(node), 1) >= 1


def _other_dim(node: fx.Node) -> bool:
    dim = _argument(node, 1, "dim", None)
    return isinstance(dim, int) and _dim(node) > 1 and dim % _dim(node) != 0


def _normalises_behind_batch(node: fx.Node) -> bool:
    shape = _argument(node, 1, "normalized_shape", ())
    return isinstance(shape, (tuple, list)) and len(shape) < _dim(node)


RULES: dict[object, Rule] = {
    F.linear: lambda node: _dim(node) >= 2,
    torch.conv1d: _has_batch(1),
    torch.conv2d: _has_batch(2),
    torch.conv3d: _has_batch(3),
    torch.conv_transpose2d: _has_batch(2),
    F.max_pool1d: _has_batch(1),
    F.max_pool2d: _has_batch(2),
    torch.max_pool2d: _has_batch(2),
    F.avg_pool2d: _has_batch(2),
    F.adaptive_avg_pool2d: _has_batch(2),
    F.adaptive_max_pool2d: _has_batch(2),
    F.batch_norm: lambda node: _argument(node, 5, "training", False) is False,
    F.layer_norm: _normalises_behind_batch,
    F.group_norm: lambda node: _dim(node) >= 2,
    F.softmax: _other_dim,
    torch.softmax: _other_dim,
    F.dropout: lambda node: _dim(node) >= 1,
    F.dropout2d: _has_batch(2),
    torch.rand_like: lambda node: _dim(node) >= 1,
    torch.randn_like: lambda node: _dim(node) >= 1,
    torch.bernoulli: lambda node: _dim(node) >= 1,
    torch.flatten: _flattens_behind_batch,
    "flatten": _flattens_behind_batch,
    "softmax": _other_dim,
}


def batch_time(gm: fx.GraphModule, call: fx.Node, loop: Loop, infos: dict[fx.Node, OpInfo]) -> int:
    """Replace `call` by its body over all steps at once; gives the number of ops. Raises `Reject` where that is unsound."""
    _check(loop, infos)
    graph = gm.graph
    _, xs, consts = loop.split(call.args)
    placeholders = loop.placeholders()
    n, m = len(loop.carries), len(loop.xs)
    env: dict[fx.Node, fx.Node] = dict(zip(placeholders[n + m :], consts, strict=True))  # type: ignore[arg-type]
    with graph.inserting_before(call):
        for placeholder, x in zip(placeholders[n : n + m], xs, strict=True):
            env[placeholder] = emit(graph, "call_method", "flatten", (x, 0, 1), {})
        for node in infos:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            if node.target is F.batch_norm and infos[node].writes:
                env[node] = emit_function(graph, batch_norm_over_time, (loop.length, *args), kwargs)
            else:
                env[node] = emit(graph, node.op, node.target, args, kwargs)
            env[node].meta = {**node.meta, **env[node].meta}
        next_carries, values = loop.results()
        series = {v: _unfold(graph, env[v], loop.length) for v in dict.fromkeys((*values, *next_carries))}
        results = [
            series[v] if y.dim == 0 else emit(graph, "call_method", "movedim", (series[v], 0, y.dim), {})
            for v, y in zip(values, loop.ys, strict=True)
        ]
        results += [
            emit(graph, "call_function", operator.getitem, (series[v], -1), {})
            for v, c in zip(next_carries, loop.carries, strict=True)
            if c.is_result
        ]
    for user in list(call.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(call)
    delattr(gm, str(call.target))
    return len(infos)


def _unfold(graph: fx.Graph, node: fx.Node, length: int) -> fx.Node:
    return emit(graph, "call_method", "unflatten", (node, 0, (length, -1)), {})


def _check(loop: Loop, infos: dict[fx.Node, OpInfo]) -> None:
    placeholders = loop.placeholders()
    n, m = len(loop.carries), len(loop.xs)
    where = {"location": loop.location}
    if any(p.users for p in placeholders[:n]):
        raise Reject("a state is carried through it", **where)
    if not m or any(x.reverse for x in loop.xs):
        raise Reject("it reads no time series, or reads one backwards", **where)
    batches = {x.example.shape[0] if x.example.dim() else None for x in loop.xs}
    if len(batches) != 1 or None in batches:
        raise Reject("its inputs have no common batch dim", **where)
    folded = set(placeholders[n : n + m])
    for node, info in infos.items():
        if node.target is F.batch_norm and info.writes:
            check_batch_norm(node, folded)
        elif not ((info.pure or not info.writes) and _is_batched(node, info, folded)):
            raise Reject(f"'{_name(node.target)}' is not known to treat its first dim as a batch", node=node.name, **where)
        folded.add(node)
    next_carries, values = loop.results()
    if any(v not in folded for v in (*values, *next_carries)):
        raise Reject("a result does not depend on time", **where)


def _is_batched(node: fx.Node, info: OpInfo, folded: set[fx.Node]) -> bool:
    operands = [i for i in node.all_input_nodes if i.op != "get_attr"]
    if len(operands) < len(node.all_input_nodes):
        return False
    if info.pointwise:
        value = example(node)
        # a constant with as many dims as the value has a batch dim of its own, which folding would stretch
        own = [example(o) for o in operands if o not in folded]
        dims = value.dim() if isinstance(value, torch.Tensor) else 0
        small = [o for o in operands if o in folded and example(o).dim() != dims]  # type: ignore[union-attr]
        return dims >= 1 and not small and all(isinstance(v, torch.Tensor) and v.dim() < dims for v in own)
    rule = RULES.get(node.target)
    batched = [o for o in operands if o in folded]
    return rule is not None and batched == [node.args[0]] and rule(node)


def _name(target: object) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
