"""A loop without a recurrence runs once over all steps (time batching).

    for t: y[t] = conv2d(x[t], w)      ->      y = conv2d(x.flatten(0, 1), w).unflatten(0, (T, -1))

Such a loop is what `distribute` leaves of the layers between neurons, or one that a user wrote.

Time is folded into the batch dim, as a person would write it, so the graph holds the one large matmul or convolution. That
is sound for ops that treat dim 0 of their input as a batch of independent samples; `RULES` lists them with what must hold.
A step with another op in it is batched by `torch.vmap` (`passes/vmap_time`), and what vmap cannot batch stays per step.

The folded op computes the same sums, but a BLAS or convolution library may add them in another order for another batch
size: results agree to rounding, not bit for bit. ``options={"batch_time": False}`` keeps the layers per step.

Batch norm in training mode keeps its statistics per step (`passes/batch_norm_over_time`). Dropout and other random ops draw
the numbers of all steps at once: the same distribution, another order than eager's.

Does not fire: other ops that write, ops with no rule of either kind.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx

from snn_compile.errors import Reject, Rejection
from snn_compile.ir.loop import Loop, LoopOutput
from snn_compile.ir.values import example, is_getitem, known_int, shape_key, storage_key
from snn_compile.passes.autocast_regions import regions
from snn_compile.passes.batch_norm_over_time import batch_norm_over_time, check_batch_norm
from snn_compile.passes.classify import AUTOGRAD_FUNCTION, OpInfo
from snn_compile.passes.emit import attribute, emit, emit_copy, emit_function, number_of_steps, replace_by_results
from snn_compile.passes.loop_results import laid_out, stacked_example
from snn_compile.passes.views import RESIZING, STRETCHING
from snn_compile.passes.vmap_time import vmap_time

CARRIED = "it reads what the step before has made of"
NO_SERIES = "it reads no time series"

#: Says whether the node treats dim 0 of its first operand (`BATCHED`: its first operands) as a batch; the other operands are
#: constants of the loop.
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


def _attends_behind_batch(node: fx.Node) -> bool:
    mask = example(_argument(node, 3, "attn_mask", None))
    same = len({example(a).dim() for a in node.args[:3]}) == 1
    return same and _dim(node) >= 3 and (mask is None or mask.dim() < _dim(node))


#: How many operands have the batch, where that is more than one.
BATCHED: dict[object, int] = {F.scaled_dot_product_attention: 3}

RULES: dict[object, Rule] = {
    F.linear: lambda node: _dim(node) >= 2,
    torch.conv1d: _has_batch(1),
    torch.conv2d: _has_batch(2),
    torch.conv3d: _has_batch(3),
    torch.conv_transpose1d: _has_batch(1),
    torch.conv_transpose2d: _has_batch(2),
    torch.conv_transpose3d: _has_batch(3),
    F.max_pool1d: _has_batch(1),
    F.max_pool2d: _has_batch(2),
    torch.max_pool2d: _has_batch(2),
    F.max_pool3d: _has_batch(3),
    F.avg_pool1d: _has_batch(1),
    F.avg_pool2d: _has_batch(2),
    F.avg_pool3d: _has_batch(3),
    F.adaptive_avg_pool2d: _has_batch(2),
    F.adaptive_max_pool2d: _has_batch(2),
    F.batch_norm: lambda node: _argument(node, 5, "training", False) is False,
    F.layer_norm: _normalises_behind_batch,
    F.group_norm: lambda node: _dim(node) >= 2,
    F.scaled_dot_product_attention: _attends_behind_batch,
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
    graph, given = gm.graph, call.args
    with graph.inserting_before(call):
        for i, x in enumerate(loop.xs, len(loop.carries)):
            if x.reverse:
                call.update_arg(i, emit(graph, "call_method", "flip", (call.args[i], 0), {}))
        try:
            series = _over_all_steps(gm, call, loop, infos)
        except Reject:
            call.args = given  # the loop stays, and reads its series backwards itself
            raise
        next_carries, values = series[: len(loop.carries)], series[len(loop.carries) :]
        results = [_output(call, v, y, loop.length) for v, y in zip(values, loop.ys, strict=True)]
        results += [
            emit(graph, "call_function", operator.getitem, (v, -1), {})
            for v, c in zip(next_carries, loop.carries, strict=True)
            if c.is_result
        ]
    replace_by_results(call, results)
    delattr(gm, str(call.target))
    return len(infos)


def _over_all_steps(gm: fx.GraphModule, call: fx.Node, loop: Loop, infos: dict[fx.Node, OpInfo]) -> list[fx.Node]:
    """The body over all steps at once -> time series of its results."""
    try:
        _check_folds(loop, infos)
        return _fold_time(gm, call, loop, infos)
    except Reject as why:
        return _vmap_time(gm, call, loop, infos, why)


def why_no_layers(loop: Loop, infos: dict[fx.Node, OpInfo]) -> Rejection | None:
    """Why a loop is not one of layers with the same weights in all steps, and nothing random among them."""
    if loop.carries:  # (with the last step's value as its only result, there is nothing to batch)
        return Rejection(f"{CARRIED} '{loop.carries[0].name}'", loop.name, loop.location)
    if all(info.pointwise for info in infos.values()):
        return Rejection("it holds no layer", loop.name, loop.location)
    if not all(info.pure for info in infos.values()):
        return Rejection("it writes, or draws random numbers", loop.name, loop.location)
    try:
        _check(loop, infos)
        _check_folds(loop, infos)
    except Reject as reject:
        return reject.rejection
    return None


def _check(loop: Loop, infos: dict[fx.Node, OpInfo]) -> None:
    for placeholder, carry in zip(loop.placeholders(), loop.carries, strict=False):
        if placeholder.users:
            raise Reject(f"{CARRIED} '{carry.name}'", location=loop.location)
    if not loop.xs:
        raise Reject(NO_SERIES, location=loop.location)


def _output(call: fx.Node, series: fx.Node, y: LoopOutput, length: int | torch.SymInt) -> fx.Node:
    """A series as `stack` gives it: in memory of its own, and laid out so that a `view` may follow."""
    graph = call.graph
    series = emit(graph, "call_method", "flip", (series, 0), {}) if y.reverse else series
    if y.dim:
        return emit(graph, "call_method", "contiguous", (emit(graph, "call_method", "movedim", (series, 0, y.dim), {}),), {})
    stacked = stacked_example(y, length)
    if storage_key(series) in {storage_key(a) for a in call.all_input_nodes}:
        return emit_copy(graph, series, stacked)
    return series if example(series).is_contiguous() else laid_out(graph, series, stacked)  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------- time as a part of the batch


def _fold_time(gm: fx.GraphModule, call: fx.Node, loop: Loop, infos: dict[fx.Node, OpInfo]) -> list[fx.Node]:
    """The body with time folded into the batch dim -> time series of its results."""
    graph = gm.graph
    _, xs, consts = loop.split(call.args)
    placeholders = loop.placeholders()
    n, m = len(loop.carries), len(loop.xs)
    env: dict[fx.Node, fx.Node] = dict(zip(placeholders[n + m :], consts, strict=True))  # type: ignore[arg-type]
    for placeholder, x in zip(placeholders[n : n + m], xs, strict=True):
        env[placeholder] = emit(graph, "call_method", "flatten", (x, 0, 1), {})
    for node in infos:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda a: env[a] if a in env else attribute(gm, loop, a))
        if node.target is F.batch_norm and infos[node].writes:
            env[node] = emit_function(graph, batch_norm_over_time, (loop.length, *args), kwargs, regions(node))
        elif (sizes := _sizes_behind_batch(node)) is not None:
            env[node] = emit(graph, "call_method", "reshape", (args[0], (-1, *sizes)), {})
        else:
            env[node] = emit(graph, node.op, node.target, args, kwargs, where=regions(node))
        env[node].meta = {**node.meta, **env[node].meta}
    next_carries, values = loop.results()
    steps = number_of_steps(call, loop)
    series = {v: _unfold(graph, env[v], steps) for v in dict.fromkeys((*values, *next_carries))}
    return [series[v] for v in (*next_carries, *values)]


def _sizes_behind_batch(node: fx.Node) -> list[int] | None:
    """``x.view(batch, -1)``: the sizes of a sample, where the first dim stays what it is. (The others are those of one step.)"""
    if node.target not in RESIZING or not node.args:
        return None
    given, value = example(node.args[0]), example(node)
    if not (isinstance(given, torch.Tensor) and isinstance(value, torch.Tensor) and given.dim() and value.dim()):
        return None
    sizes = [known_int(s) for s in value.shape[1:]]
    is_kept = shape_key(given)[0] == shape_key(value)[0]
    return sizes if is_kept and None not in sizes else None  # type: ignore[return-value]


def _unfold(graph: fx.Graph, node: fx.Node, steps: int | fx.Node) -> fx.Node:
    return emit(graph, "call_method", "unflatten", (node, 0, (steps, -1)), {})


def _check_folds(loop: Loop, infos: dict[fx.Node, OpInfo]) -> None:
    placeholders = loop.placeholders()
    n, m = len(loop.carries), len(loop.xs)
    batches = {shape_key(x.example)[0] if x.example.dim() else None for x in loop.xs}
    if len(batches) != 1 or None in batches:
        raise Reject("its inputs have no common batch dim", location=loop.location)
    folded = set(placeholders[n : n + m])
    for node, info in infos.items():
        if node.target is F.batch_norm and info.writes:
            if known_int(loop.length) is None:
                raise Reject("a batch norm in training mode, over steps whose number is not known", location=loop.location)
            check_batch_norm(node, folded)
        elif not ((info.pure or not info.writes) and _is_batched(node, info, folded)):
            reason = f"'{_name(node.target)}' is not known to treat its first dim as a batch"
            raise Reject(reason, node=node.name, location=loop.location)
        folded.add(node)
    next_carries, values = loop.results()
    if any(v not in folded for v in (*values, *next_carries)):
        raise Reject("a result does not depend on time", location=loop.location)


def _vmap_time(gm: fx.GraphModule, call: fx.Node, loop: Loop, infos: dict[fx.Node, OpInfo], why: Reject) -> list[fx.Node]:
    """Where folding is unsound for the reason `why`: by vmap, or not at all, for both reasons."""
    if any(info.writes for info in infos.values()):
        raise why
    try:
        return vmap_time(gm, call, loop)
    except Reject as reject:
        first = why.rejection
        raise Reject(f"{first.reason}; {reject.rejection.reason}", node=first.node, location=loop.location) from reject


def _is_batched(node: fx.Node, info: OpInfo, folded: set[fx.Node]) -> bool:
    operands = [i for i in node.all_input_nodes if i.op != "get_attr"]
    if len(operands) < len(node.all_input_nodes) and node.target is not AUTOGRAD_FUNCTION:
        return False
    if is_getitem(node) and node.args[0].target is AUTOGRAD_FUNCTION:  # type: ignore[union-attr]
        return info.pointwise
    if _sizes_behind_batch(node) is not None:
        return node.args[0] in folded
    if info.pointwise and node.target not in RESIZING | STRETCHING:  # (their sizes are those of one step)
        value = example(node)
        value = value[0] if isinstance(value, (tuple, list)) else value
        # a constant with as many dims as the value has a batch dim of its own, which folding would stretch
        own = [example(o) for o in operands if o not in folded]
        dims = value.dim() if isinstance(value, torch.Tensor) else 0
        small = [o for o in operands if o in folded and example(o).dim() != dims]  # type: ignore[union-attr]
        return dims >= 1 and not small and all(isinstance(v, torch.Tensor) and v.dim() < dims for v in own)
    rule = RULES.get(node.target)
    count = BATCHED.get(node.target, 1)
    batched = {o for o in operands if o in folded}
    return rule is not None and len(node.args) >= count and batched == set(node.args[:count]) and rule(node)


def _name(target: object) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
