"""Convolutions on CPU and the neurons behind them work on channels-last values.

    y = conv2d(x, w); s, v = neuron(y); z = max_pool2d(s)   ->   y = conv2d(x.contiguous(channels_last), w); …; z.contiguous()

Inductor runs convolutions on CPU channels-last in any case, and turns their results back for every op that wants eager's layout -
such as a kernel of ours, and all that autograd saves. Here the values between convolutions keep it, and what leaves them has
eager's layout again. Nothing but layout changes.

Does not fire: on other devices, where no kernel of ours reads a convolution, on values that are channels-last in eager.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from snn_compile.ir.values import example, is_getitem, known_int
from snn_compile.lowering.registration import NAMESPACE
from snn_compile.passes.emit import emit

CONVOLUTIONS = {torch.conv2d, F.conv2d}
#: Give a result in the layout of their first operand.
_KEEPS_LAYOUT = {
    *CONVOLUTIONS,
    F.max_pool2d,
    torch.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d,
    F.batch_norm,
    F.dropout,
    F.dropout2d,
    F.relu,
    torch.relu,
    torch.add,
    torch.mul,
    operator.add,
    operator.mul,
}


def channels_last(graph: fx.Graph) -> int:
    """Give convolutions channels-last inputs; returns how many."""
    if not _inductor_prefers_it():
        return 0
    chosen = [n for n in graph.nodes if _is_convolution(n) and _reaches_kernel(n)]
    for node in chosen:
        with graph.inserting_before(node):
            node.update_arg(0, _to_channels_last(graph, node.args[0]))
    _restore_at_exits(graph, set(chosen))
    return len(chosen)


def _inductor_prefers_it() -> bool:
    from torch._inductor import config

    mkldnn = torch.backends.mkldnn
    return bool(config.layout_optimization and mkldnn.is_available() and mkldnn.enabled)


def _is_convolution(node: fx.Node) -> bool:
    """In eager's usual layout, on CPU, of a batch of images of a known size."""
    if node.target not in CONVOLUTIONS or len(node.args) < 2:
        return False
    x, y = example(node.args[0]), example(node)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or y.dim() != 4 or y.device.type != "cpu":
        return False
    is_known = None not in [known_int(s) for s in (*x.shape, *y.shape)]
    return is_known and bool(y.is_contiguous()) and y[0].numel() > y.shape[1] > 1


def _reaches_kernel(node: fx.Node) -> bool:
    """A kernel reads the value, or what ops that keep its layout make of it."""
    seen, frontier = {node}, [node]
    while frontier:
        for user in frontier.pop().users:
            if _is_kernel(user):
                return True
            if user not in seen and _keeps_layout(user) and user.target not in CONVOLUTIONS:
                seen.add(user)
                frontier.append(user)
    return False


def _is_kernel(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == NAMESPACE


def _keeps_layout(node: fx.Node) -> bool:
    if node.op == "call_method":
        return (node.target == "flatten" and node.args[1:] == (0, 1)) or (node.target == "unflatten" and node.args[1] == 0)
    if node.op != "call_function":
        return False
    operands = [example(a) for a in node.args if isinstance(a, fx.Node)]
    shapes = {v.shape for v in operands if isinstance(v, Tensor)}
    of_same_shape = len(shapes) == 1 or node.target not in (torch.add, torch.mul, operator.add, operator.mul)
    if is_getitem(node):
        return isinstance(node.args[0], fx.Node) and _is_kernel(node.args[0])
    return (node.target in _KEEPS_LAYOUT and of_same_shape) or _is_kernel(node)


def _to_channels_last(graph: fx.Graph, x: fx.Node) -> fx.Node:
    value = example(x)
    assert isinstance(value, Tensor)
    if value.shape[1] > 1:
        return emit(graph, "call_method", "contiguous", (x,), {"memory_format": torch.channels_last})
    # one channel lies in memory in both ways: strides decide what an op takes it for
    n, _, *space = value.shape
    return emit(graph, "call_method", "permute", (emit(graph, "call_method", "reshape", (x, n, *space, 1), {}), 0, 3, 1, 2), {})


def _restore_at_exits(graph: fx.Graph, convolutions: set[fx.Node]) -> None:
    """Ops that may depend on the layout see eager's."""
    inside: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node in convolutions or (_keeps_layout(node) and any(a in inside for a in node.all_input_nodes)):
            inside.add(node)
    for node in [n for n in graph.nodes if n in inside]:
        value = example(node)
        exits = [u for u in node.users if u not in inside and u.target != "copy_"]
        if not exits or not isinstance(value, Tensor) or value.dim() < 4:
            continue
        with graph.inserting_after(node):
            restored = emit(graph, "call_method", "contiguous", (node,), {})
        for user in exits:
            user.replace_input_with(node, restored)
