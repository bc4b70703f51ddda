"""Which loops are rerolled: those of which a kernel can hold something, and gains by it."""

from __future__ import annotations

import torch

from snn_compile.config import Config
from snn_compile.errors import Rejection
from snn_compile.ir.loop import Loop
from snn_compile.ir.values import base_name, example, known_int
from snn_compile.lowering import ops
from snn_compile.lowering.refusals import why_unrolled, why_written
from snn_compile.lowering.step_programs import may_step, runs_by_channel
from snn_compile.passes.classify import classify
from snn_compile.passes.convolutions_at_one_position import is_at_one_position
from snn_compile.passes.distribute import Group, find_groups
from snn_compile.passes.effects import is_write
from snn_compile.passes.hoist import find_invariant
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
    refused += [why_written(n, loop) for n in infos if is_write(n)]
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
