"""In inference, a batch norm with fixed statistics before a loop moves into the loop (producer fusion).

    x = batch_norm(y, mean, var, w, b).unflatten(0, (T, -1)); s = loop(x)
    ->  s = loop'(y.unflatten(0, (T, -1)), mean, var, w, b)       where the step normalises its slice of y

A network in multi-step form normalises all steps at once and hands them to the neuron: a pass over memory, read and written,
between a convolution and its neuron. In the loop it is one multiply-add a lane (`passes/fold_batch_norm`), eager's bit for bit.

Does not fire: where gradients are recorded, where the normalised values are read elsewhere too, and where `fold_batch_norm` would
not fire on them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from snn_compile.ir.loop import Loop
from snn_compile.ir.values import example, shape_key, size_key
from snn_compile.passes.emit import emit, number_of_steps
from snn_compile.passes.fixed_batch_norm import arguments, is_fixed_batch_norm
from snn_compile.passes.fuse_consumers import add_operand

#: Ways of writing ``[T*B, ...] -> [T, B, ...]``
SPLITS = ("unflatten", "view", "reshape", torch.unflatten, torch.reshape)


def fuse_producers(gm: fx.GraphModule, call: fx.Node, loop: Loop) -> int:
    """Rewrite `gm` and `loop` in place; gives how many batch norms moved in."""
    if torch.is_grad_enabled():
        return 0
    n = len(loop.carries)
    return sum(_fuse(gm, call, loop, i) for i in range(n, n + len(loop.xs)))


def _fuse(gm: fx.GraphModule, call: fx.Node, loop: Loop, place: int) -> bool:
    series = call.args[place]
    norm = _normalised(series, loop.length) if isinstance(series, fx.Node) and call.args.count(series) == 1 else None
    if norm is None:
        return False
    given = arguments(norm)
    parameters = ("running_mean", "running_var", "weight", "bias")
    if not is_fixed_batch_norm(norm, [given[name] for name in parameters]):
        return False
    with gm.graph.inserting_before(call):
        raw = emit(gm.graph, "call_method", "unflatten", (given["input"], 0, (number_of_steps(call, loop), -1)), {})
    call.update_arg(place, raw)
    placeholder, body = loop.placeholders()[place], loop.body.graph
    placeholder.meta = {**placeholder.meta, "example_value": example(raw)[0]}
    loop.xs[place - len(loop.carries)].example = example(raw)[0]
    consts = [given[name] and add_operand(call, loop, given[name], is_series=False) for name in parameters]
    users = list(placeholder.users)
    with body.inserting_after(loop.placeholders()[-1]):
        node = body.call_function(F.batch_norm, (placeholder, *consts, False, given["momentum"], given["eps"]))
    node.meta = {**norm.meta, "example_value": example(series)[0]}
    for user in users:
        user.replace_input_with(placeholder, node)
    loop.body.recompile()
    for dead in (series, norm):
        gm.graph.erase_node(dead)
    return True


def _normalised(series: fx.Node, length: int | torch.SymInt) -> fx.Node | None:
    """The batch norm whose result `series` is, split into steps; None where it is anything else, or has another reader."""
    source = series.args[0] if series.target in SPLITS and series.args else None
    if not isinstance(source, fx.Node) or source.target is not F.batch_norm or len(series.users) > 1 or len(source.users) > 1:
        return None
    split, whole = shape_key(example(series)), shape_key(example(source))
    if len(split) != len(whole) + 1:
        return None
    time, batch, *_ = example(series).shape
    is_split = split[0] == size_key(length) and size_key(time * batch) == whole[0] and split[2:] == whole[1:]
    return source if is_split else None
