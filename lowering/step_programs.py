"""What a recurrence that is more than pointwise can run as: a program of kernels and calls, or one kernel, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from snn_compile.ir.loop import Loop
from snn_compile.ir.values import example
from snn_compile.lowering.by_channel import suits_channels
from snn_compile.lowering.channel_program import channel_shapes
from snn_compile.passes.carry_statistics import updates_statistics, why_not_carried
from snn_compile.passes.classify import OpInfo
from snn_compile.passes.distribute import Group


def may_step(loop: Loop, groups: list[Group], infos: dict[fx.Node, OpInfo]) -> bool:
    """Whether a recurrence that is no kernel can be a program of kernels and calls."""
    return any(g.recurrent and all(runs_in_program(n, loop, infos) for n in g.nodes) for g in groups)


def runs_in_program(node: fx.Node, loop: Loop, infos: dict[fx.Node, OpInfo]) -> bool:
    """It neither draws random numbers nor writes, but for the statistics of a batch norm that all steps share."""
    if updates_statistics(node):
        return why_not_carried(node, constants(loop)) is None
    return infos[node].pure


def constants(loop: Loop) -> list[fx.Node]:
    return list(loop.split(loop.placeholders())[2])


def runs_by_channel(nodes: list[fx.Node], infos: dict[fx.Node, OpInfo]) -> bool:
    """All that is not pointwise are batch norms over channels, where a kernel runs channel by channel (`lowering/by_channel`)."""
    calls = [n for n in nodes if not infos[n].pointwise]
    return bool(calls) and all(updates_statistics(n) and suits_channels(example(n.args[0])) for n in calls)


def normalises_for(consts: Sequence[fx.Node], group: Group, neuron: Group) -> bool:
    """Whether `group` is a batch norm that one kernel runs with the neuron behind it, channel by channel: all that the neuron
    reads and makes is as the batch norm's values, or one number a channel that wants no gradient.

    `consts`: invariant operands of the loop.
    """
    norm, whole = group.nodes[0], example(group.nodes[0])
    if len(group.nodes) != 1 or not updates_statistics(norm) or why_not_carried(norm, consts) is not None:
        return False
    assert isinstance(whole, torch.Tensor)
    if whole.device.type != "cpu" or not suits_channels(whole):  # (on a GPU, nobody has measured it)
        return False
    channel = {(), *channel_shapes(whole.shape)}

    def fits(value: object, is_read: bool) -> bool:
        if not isinstance(value, torch.Tensor):
            return True
        if value.shape == whole.shape:
            return value.dtype == torch.float32 or (value.dtype == torch.bool and not is_read)
        return is_read and tuple(value.shape) in channel and value.dtype == torch.float32 and not value.requires_grad

    made = set(neuron.nodes)
    ops = [n for n in neuron.nodes if not updates_statistics(n)]  # (a batch norm that has joined before reads its own weights)
    read = {n for node in ops for n in node.all_input_nodes if n not in made and n is not norm}
    return all(fits(example(n), False) for n in made) and all(fits(example(n), True) for n in read)
