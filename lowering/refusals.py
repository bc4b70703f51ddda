"""Why a recurrence that is no kernel is unrolled, and what to change: the words that users read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from snn_compile.errors import Rejection
from snn_compile.ir.loop import Loop
from snn_compile.ir.values import base_name, count_text, example, storage_key, user_line, user_location
from snn_compile.lowering.step_programs import constants, runs_in_program
from snn_compile.passes.carry_statistics import updates_statistics
from snn_compile.passes.classify import OpInfo
from snn_compile.passes.effects import is_write, written
from snn_compile.passes.fixed_batch_norm import arguments
from snn_compile.passes.loop_body import STEPS_OWN_WEIGHTS


def why_unrolled(loop: Loop, nodes: Sequence[fx.Node], infos: dict[fx.Node, OpInfo]) -> Rejection | None:
    """Of a recurrence that is no kernel: what its state goes through, and what to change."""
    in_the_way = [n for n in nodes if not runs_in_program(n, loop, infos)]
    calls = in_the_way or [n for n in nodes if not infos[n].pointwise]
    if not calls:
        return None
    if is_write(calls[0]) and (reason := why_written(calls[0], loop)) is not None:
        return reason
    target = calls[0].target
    name = target if isinstance(target, str) else getattr(target, "__name__", target)
    what = "which is not pointwise"
    if in_the_way and updates_statistics(calls[0]) and arguments(calls[0])["running_mean"] not in constants(loop):
        what = f"which {STEPS_OWN_WEIGHTS}"
    hint = _CHECKPOINT if _is_checkpoint(calls[0]) else "" if in_the_way else step_from(loop)
    return Rejection(f"a state goes through '{name}' from step to step, {what}", calls[0].name, loop.location, hint)


def why_written(node: fx.Node, loop: Loop) -> Rejection | None:
    """A write that `passes/functionalize` could not make a value; a counter's is no user's concern."""
    target = next(iter(written(node)), None)
    value = example(target)
    if target is None or not isinstance(value, torch.Tensor) or not (value.dim() or value.is_floating_point()):
        return None
    code = user_line(node) or base_name(node.name)
    if storage_key(target) in map(storage_key, constants(loop)):
        reason = f"'{code}' writes into memory from outside of the loop in every step"
        hint = "work on a copy, v = v.clone(), and write it back behind the loop: buffer.copy_(v)"
    else:
        reason = f"'{code}' writes into a value of the loop through a view of it"
        hint = "make a new value of the whole: v = torch.where(mask, 0.0, v)"
    return Rejection(reason, node.name, user_location(node) or loop.location, hint)


_CHECKPOINT = "a kernel saves no more of a step than torch.utils.checkpoint does: call the step without, or the whole loop in one"


def _is_checkpoint(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() == "tag_activation_checkpoint"


def step_from(loop: Loop) -> str:
    return f"options={{'step_from': {count_text(loop.length)}}} runs it as a program of kernels and calls"
