"""Which loops become kernels: whether one can hold them, whether it gains, and the reasons that users read where not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from snn_compile.config import Config
from snn_compile.errors import Rejection
from snn_compile.ir.loop import Loop
from snn_compile.ir.values import base_name, count_text, example, known_int, storage_key, user_line, user_location
from snn_compile.lowering import ops
from snn_compile.lowering.by_channel import suits_channels
from snn_compile.lowering.channel_program import channel_shapes
from snn_compile.passes.carry_statistics import updates_statistics, why_not_carried
from snn_compile.passes.classify import OpInfo, classify
from snn_compile.passes.convolutions_at_one_position import is_at_one_position
from snn_compile.passes.distribute import Group, find_groups
from snn_compile.passes.effects import is_write, written
from snn_compile.passes.fixed_batch_norm import arguments
from snn_compile.passes.hoist import find_invariant
from snn_compile.passes.loop_body import STEPS_OWN_WEIGHTS
from snn_compile.passes.trace_step import core_decompositions

#: Fewer ops than this behind the first step are no neuron: a sum of two losses, two residuals, ``w + a*s`` twice in a step.
FEWEST_OPS = 3

#: Pointwise ops without PyTorch's tag for them (in torch 2.13, leaky_relu, elu and gelu have it).
UNTAGGED = (
    "hardswish.default",
    "leaky_relu.default",
    "elu.default",
    "gelu.default",
    "log_sigmoid_forward.default",
    "masked_fill.Tensor",
)


def is_pointwise_op(op: torch._ops.OpOverload) -> bool:
    """Whether a kernel can hold this overload, as it is or after decomposition."""
    name = ops.overload_name(op)
    if name in ops.TABLE or name in ops.CONSTANTS or name in UNTAGGED:
        return True
    return torch.Tag.pointwise in op.tags and op in core_decompositions()


def why_not(loop: Loop, config: Config) -> Rejection | None:
    """A loop is rerolled where at least one recurrence in it can become a kernel."""
    infos = classify(loop, is_pointwise_op)
    groups = find_groups(loop, infos, ignore=find_invariant(loop, infos))
    kernels = [g for g in groups if g.is_kernel and not _counts(g)]
    count = sum(len(g.nodes) for g in kernels)
    steps = known_int(loop.length)
    if kernels and steps is not None and (steps - 1) * count < FEWEST_OPS:
        reason = f"{steps} steps of {count} ops: Inductor fuses them as they are"
        return Rejection(reason, loop.name, loop.location)
    if kernels:
        return _why_growing(loop, groups)
    is_long = not loop.is_shorter(config.step_from)

    def gains(group: Group) -> bool:  # (a product in place of a convolution is worth it unrolled, too)
        return is_long or runs_by_channel(group.nodes, infos) or any(map(is_at_one_position, group.nodes))

    if any(g.recurrent and gains(g) for g in groups) and may_step(loop, groups, infos):
        return _why_growing(loop, groups)
    refused = [why_unrolled(loop, g.nodes, infos) for g in groups if g.recurrent]
    refused += [_why_written(n, loop) for n in infos if is_write(n)]
    if any(refused):
        return next(filter(None, refused))
    return Rejection("nothing is carried from step to step", loop.name, loop.location)


def _why_growing(loop: Loop, groups: list[Group]) -> Rejection | None:
    """A value that is smaller in the first step is the same lane by lane, in a kernel; nowhere else."""
    for node in (n for g in groups if not g.is_kernel for n in g.nodes):
        for value in (node, *node.all_input_nodes):
            if value.meta.get("grows"):
                return Rejection(
                    f"'{base_name(value.name)}' has another shape in the first step than in all others",
                    value.name,
                    loop.location,
                    "start the states in the shape that they have later",
                )
    return None


def _counts(group: Group) -> bool:
    """One integer, such as the number of batches that a batch norm has seen: no neuron."""
    values = [example(n) for n in group.nodes]
    return all(isinstance(v, torch.Tensor) and v.dim() == 0 and not v.is_floating_point() for v in values)


def why_unrolled(loop: Loop, nodes: Sequence[fx.Node], infos: dict[fx.Node, OpInfo]) -> Rejection | None:
    """Of a recurrence that is no kernel: what its state goes through, and what to change."""
    in_the_way = [n for n in nodes if not _runs_in_program(n, loop, infos)]
    calls = in_the_way or [n for n in nodes if not infos[n].pointwise]
    if not calls:
        return None
    if is_write(calls[0]) and (reason := _why_written(calls[0], loop)) is not None:
        return reason
    target = calls[0].target
    name = target if isinstance(target, str) else getattr(target, "__name__", target)
    what = "which is not pointwise"
    if in_the_way and updates_statistics(calls[0]) and arguments(calls[0])["running_mean"] not in _consts(loop):
        what = f"which {STEPS_OWN_WEIGHTS}"
    hint = _CHECKPOINT if _is_checkpoint(calls[0]) else "" if in_the_way else step_from(loop)
    return Rejection(f"a state goes through '{name}' from step to step, {what}", calls[0].name, loop.location, hint)


def _why_written(node: fx.Node, loop: Loop) -> Rejection | None:
    """A write that `passes/functionalize` could not make a value; a counter's is no user's concern."""
    target = next(iter(written(node)), None)
    value = example(target)
    if target is None or not isinstance(value, torch.Tensor) or not (value.dim() or value.is_floating_point()):
        return None
    code = user_line(node) or base_name(node.name)
    if storage_key(target) in map(storage_key, _consts(loop)):
        reason = f"'{code}' writes into memory from outside of the loop in every step"
        hint = "work on a copy, v = v.clone(), and write it back behind the loop: buffer.copy_(v)"
    else:
        reason = f"'{code}' writes into a value of the loop through a view of it"
        hint = "make a new value of the whole: v = torch.where(mask, 0.0, v)"
    return Rejection(reason, node.name, user_location(node) or loop.location, hint)


def _consts(loop: Loop) -> list[fx.Node]:
    return list(loop.split(loop.placeholders())[2])


_CHECKPOINT = "a kernel saves no more of a step than torch.utils.checkpoint does: call the step without, or the whole loop in one"


def _is_checkpoint(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() == "tag_activation_checkpoint"


def step_from(loop: Loop) -> str:
    return f"options={{'step_from': {count_text(loop.length)}}} runs it as a program of kernels and calls"


def may_step(loop: Loop, groups: list[Group], infos: dict[fx.Node, OpInfo]) -> bool:
    """Whether a recurrence that is no kernel can be a program of kernels and calls."""
    return any(g.recurrent and all(_runs_in_program(n, loop, infos) for n in g.nodes) for g in groups)


def _runs_in_program(node: fx.Node, loop: Loop, infos: dict[fx.Node, OpInfo]) -> bool:
    """It neither draws random numbers nor writes, but for the statistics of a batch norm that all steps share."""
    if updates_statistics(node):
        return why_not_carried(node, _consts(loop)) is None
    return infos[node].pure


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
