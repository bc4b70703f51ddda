"""Convolutions on CPU and the neurons behind them work on channels-last values.

    y = conv2d(x, w); s, v = neuron(y); z = max_pool2d(s)   ->   y = conv2d(x.contiguous(channels_last), w); …; z.contiguous()

Inductor runs convolutions on CPU channels-last in any case, and turns their results back for every op that wants eager's layout -
such as a kernel of ours, and all that autograd saves. Here the values between convolutions keep it, and what leaves them has
eager's layout again. Nothing but layout changes. Max pooling between them is ATen's where it is differentiated
(`lowering/max_pool`).

Does not fire: on other devices, where no kernel of ours reads a convolution, on values that are channels-last in eager or that
are written into, where a pointwise kernel reads one number a channel (fixed batch norm): its rows would be as short as there are
channels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from snn_compile.ir.values import example, is_getitem, known_int
from snn_compile.passes.classify import storage_key
from snn_compile.passes.effects import is_write
from snn_compile.passes.emit import emit, emit_function

_CONVOLUTIONS = {torch.conv2d, F.conv2d}
#: Give a result in the layout of their first operand.
_KEEPS_LAYOUT = {
    *_CONVOLUTIONS,
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
}
_POINTWISE = {torch.add, torch.mul, operator.add, operator.mul}


#: Whether a node is a kernel of ours.
IsKernel = Callable[[fx.Node], bool]


def channels_last(graph: fx.Graph, is_kernel: IsKernel, max_pool2d: Callable[..., fx.Proxy]) -> int:
    """Give convolutions channels-last inputs; returns how many. `max_pool2d`: what pools values that are differentiated."""
    if not _inductor_prefers_it():
        return 0
    chosen = [n for n in graph.nodes if _is_convolution(n) and _reaches_kernel(n, is_kernel)]
    if _is_written(graph, _inside(graph, set(chosen), is_kernel)):
        return 0
    inside = _inside(graph, {_make_channels_last(graph, node) for node in chosen}, is_kernel)
    _restore_at_exits(graph, inside)
    for node in inside:
        _pool_by(max_pool2d, graph, node)
    return len(chosen)


def _inductor_prefers_it() -> bool:
    from torch._inductor import config

    mkldnn = torch.backends.mkldnn
    return bool(config.layout_optimization and mkldnn.is_available() and mkldnn.enabled)


def _is_convolution(node: fx.Node) -> bool:
    """In eager's usual layout, on CPU, of a batch of images of a known size."""
    if node.target not in _CONVOLUTIONS or len(node.args) < 2:
        return False
    x, y = example(node.args[0]), example(node)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or y.dim() != 4 or y.device.type != "cpu":
        return False
    if None in [known_int(s) for s in (*x.shape, *y.shape)]:
        return False
    return y.is_contiguous() and y.shape[0] > 0 and y[0].numel() > y.shape[1] > 1


def _reaches_kernel(node: fx.Node, is_kernel: IsKernel) -> bool:
    """A kernel reads the value, or what ops that keep its layout make of it."""
    seen, frontier = {node}, [node]
    while frontier:
        for user in frontier.pop().users:
            if is_kernel(user) and not _reads_rows_of_channels(user):
                return True
            if user not in seen and _keeps_layout(user, is_kernel) and user.target not in _CONVOLUTIONS:
                seen.add(user)
                frontier.append(user)
    return False


def _reads_rows_of_channels(kernel: fx.Node) -> bool:
    """A pointwise kernel that reads one number a channel: channels-last, its rows would be as short as there are channels."""
    shapes = [v.shape for v in map(example, kernel.args) if isinstance(v, Tensor)]
    return any(len(s) > 2 and s[-1] == 1 and max(s) > 1 for s in shapes)


def _keeps_layout(node: fx.Node, is_kernel: IsKernel) -> bool:
    if node.op == "call_method":
        return (node.target, node.args[1:2]) == ("unflatten", (0,)) or (node.target, node.args[1:]) == ("flatten", (0, 1))
    if node.op != "call_function":
        return False
    if is_getitem(node):
        return isinstance(node.args[0], fx.Node) and is_kernel(node.args[0])
    shapes = [v.shape for v in map(example, node.all_input_nodes) if isinstance(v, Tensor)]
    if node.target in _POINTWISE:
        return all(s == shapes[0] for s in shapes)
    return is_kernel(node) or node.target in _KEEPS_LAYOUT


def _make_channels_last(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The convolution's result, channels-last."""
    last = {"memory_format": torch.channels_last}
    image = node.args[0]
    if example(image).shape[1] > 1:  # type: ignore[union-attr]
        with graph.inserting_before(node):
            node.update_arg(0, emit(graph, "call_method", "contiguous", (image,), last))
        return node
    # an image of one channel lies in memory in both ways, and an op takes it for the usual one
    with graph.inserting_after(node):
        new = emit(graph, "call_method", "contiguous", (node,), last)
    node.replace_all_uses_with(new, lambda user: user is not new)
    return new


def _inside(graph: fx.Graph, starts: set[fx.Node], is_kernel: IsKernel) -> dict[fx.Node, None]:
    """Convolutions' results, and what follows them channels-last, in order."""
    inside: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node in starts or (_keeps_layout(node, is_kernel) and any(a in inside for a in node.all_input_nodes)):
            inside[node] = None
    return inside


def _is_written(graph: fx.Graph, nodes: Iterable[fx.Node]) -> bool:
    """A write would go into the value that one op reads, and not into the copy that another one does."""
    written = {storage_key(n.args[0]) for n in graph.nodes if is_write(n) and n.args and isinstance(n.args[0], fx.Node)}
    values = [(n, example(n)) for n in nodes]
    return any(isinstance(v, Tensor) and v.dim() >= 4 and storage_key(n) in written for n, v in values)


def _restore_at_exits(graph: fx.Graph, inside: dict[fx.Node, None]) -> None:
    """Ops that may depend on the layout see eager's."""
    for node in inside:
        value = example(node)
        exits = [u for u in node.users if u not in inside and u.target != "copy_"]
        if not exits or not isinstance(value, Tensor) or value.dim() < 4:
            continue
        with graph.inserting_after(node):
            restored = emit(graph, "call_method", "contiguous", (node,), {})
        for user in exits:
            user.replace_input_with(node, restored)


def _pool_by(max_pool2d: Callable[..., fx.Proxy], graph: fx.Graph, node: fx.Node) -> None:
    value = example(node)
    if node.target not in (F.max_pool2d, torch.max_pool2d) or not isinstance(value, Tensor) or not value.requires_grad:
        return
    with graph.inserting_before(node):
        new = emit_function(graph, max_pool2d, node.args, node.kwargs)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
