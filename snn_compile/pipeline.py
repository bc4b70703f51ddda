"""THE list of passes, in order, and how a graph goes through them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import fx
from torch._dynamo.utils import counters

from snn_compile.config import Config
from snn_compile.errors import Reject, Rejection
from snn_compile.ir.equations import equations
from snn_compile.ir.loop import Loop, loop_calls
from snn_compile.ir.recurrence import Recurrence
from snn_compile.ir.stepped import SteppedRecurrence
from snn_compile.ir.values import example, flat_nodes
from snn_compile.lowering import targets
from snn_compile.lowering.candidates import is_pointwise_op, why_not
from snn_compile.lowering.dump import Dump
from snn_compile.lowering.lower_loops import lower_loop, make_recurrence, make_stepped
from snn_compile.lowering.max_pool import max_pool2d
from snn_compile.lowering.refusals import step_from, why_unrolled
from snn_compile.lowering.register_stepped import register_stepped
from snn_compile.lowering.registration import is_kernel, register, saved_operands
from snn_compile.lowering.step_programs import may_step, normalises_for, runs_by_channel
from snn_compile.passes.autocast_regions import name_regions, regions, restore_regions, under
from snn_compile.passes.batch_time import batch_time, why_no_layers
from snn_compile.passes.cancel_views import cancel_views
from snn_compile.passes.carry_statistics import (
    carry_statistics,
    separate_saved_statistics,
)
from snn_compile.passes.channels_last import channels_last
from snn_compile.passes.chunk_time import chunk_length, chunk_time
from snn_compile.passes.classify import OpInfo, classify
from snn_compile.passes.convolutions_at_one_position import replace_convolutions_at_one_position
from snn_compile.passes.decompose import decompose
from snn_compile.passes.delay_lines import delay_lines
from snn_compile.passes.distribute import distribute, find_groups
from snn_compile.passes.emit import delete_unused_children
from snn_compile.passes.fold_batch_norm import fold_batch_norm
from snn_compile.passes.fold_threshold import fold_threshold
from snn_compile.passes.function_transforms import why_transformed
from snn_compile.passes.functionalize import functionalize
from snn_compile.passes.fuse_consumers import fuse_consumers
from snn_compile.passes.fuse_producers import fuse_producers
from snn_compile.passes.fuse_recurrences import Traced, fuse_recurrences
from snn_compile.passes.grow_states import grow_states
from snn_compile.passes.hoist import hoist
from snn_compile.passes.hoist_creations import hoist_creations
from snn_compile.passes.index_steps import index_steps, index_stores
from snn_compile.passes.inline_detached import inline_detached
from snn_compile.passes.inline_steps import inline_steps
from snn_compile.passes.merge_views import merge_views
from snn_compile.passes.move_own_layers import move_own_layers
from snn_compile.passes.name_results import name_results
from snn_compile.passes.no_grad_regions import drop_idle_detaches
from snn_compile.passes.read_steps_in_regions import REGIONS, is_region, read_steps_in_regions
from snn_compile.passes.reroll import reroll
from snn_compile.passes.roll_scan import roll_scans
from snn_compile.passes.separate_results import results_of, separate_results
from snn_compile.passes.separate_saved import separate_saved
from snn_compile.passes.shift_series import shift_series
from snn_compile.passes.specialize import (
    drop_unread_sizes,
    fold_sizes,
    name_allowed_functions,
    specialize_floats,
    specialize_length,
    specialize_sizes,
)
from snn_compile.passes.split_slots import split_slots
from snn_compile.passes.unroll import restore_writes, unroll
from snn_compile.passes.unwrap_steps import unwrap_steps
from snn_compile.passes.views import VIEWS
from snn_compile.passes.views_of_inputs import views_of_inputs
from snn_compile.passes.work_on_copies import work_on_copies
from snn_compile.passes.write_out import write_out

#: Everything `counters["snn_compile"]` counts.
COUNTERS = (
    "ops_decomposed",
    "layers_moved",
    "loops_rerolled",
    "recurrences_lowered",
    "recurrences_stepped",
    "ops_time_batched",
    "ops_hoisted",
    "loops_chunked",
    "consumers_fused",
    "producers_fused",
    "recurrences_fused",
    "batch_norms_folded",
    "thresholds_folded",
    "convolutions_replaced",
    "convolutions_channels_last",
    "rejections",
    "pass_failures",
)


@dataclass
class Report:
    """What the pipeline did to one graph."""

    loops: list[Loop] = field(default_factory=list)
    recurrences: list[Recurrence] = field(default_factory=list)
    #: recurrences whose step is more than pointwise: programs of kernels and calls
    stepped: list[SteppedRecurrence] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    ops_hoisted: int = 0
    ops_time_batched: int = 0
    convolutions_replaced: int = 0
    changed: bool = False

    @property
    def lowered(self) -> list[Recurrence | SteppedRecurrence]:
        return [*self.recurrences, *self.stepped]


def run_pipeline(gm: fx.GraphModule, config: Config) -> tuple[fx.GraphModule, Report]:
    """Rewrite `gm` in place; where nothing was lowered, or a pass fails, it is as it was."""
    backup = _Backup(gm)
    try:
        report = _run_passes(gm, config)
    except Exception:
        backup.restore()
        raise
    if not report.changed:
        backup.restore()
    return gm, report


def _run_passes(work: fx.GraphModule, config: Config) -> Report:
    report, counted = Report(), dict(counters["snn_compile"])
    dump = Dump(config.dump)
    dump(work, "0_dynamo")
    if (transformed := why_transformed(work.graph)) is not None:
        report.rejections.append(transformed)
        counters["snn_compile"]["rejections"] += 1
        return report
    given = results_of(work.graph)
    inline_steps(work)
    if not name_regions(work.graph):
        report.rejections.append(Rejection("a region of autocast ends in another graph than it begins"))
        counters["snn_compile"]["rejections"] += 1
        return report
    read_steps_in_regions(work)
    specialize_floats(work)
    fold_sizes(work)
    drop_unread_sizes(work)
    name_allowed_functions(work)
    decomposed, refused = decompose(work)
    report.rejections += refused
    counters["snn_compile"]["ops_decomposed"] += decomposed
    write_out(work.graph)
    views_of_inputs(work.graph)
    work_on_copies(work.graph)
    split_slots(work.graph)
    unwrap_steps(work)
    inline_detached(work)
    merge_views(work.graph)
    index_steps(work)
    functionalize(work)
    unwrap_steps(work)  # (what was written into before)
    delay_lines(work)
    name_results(work.graph)
    index_stores(work)
    hoist_creations(work)
    cancel_views(work.graph)
    counters["snn_compile"]["layers_moved"] += move_own_layers(work)
    dump(work, "1_functionalize")
    loops, rejections, scans = roll_scans(work, lambda loop: why_not(loop, config), config.min_steps)
    layers = (lambda loop: why_no_layers(loop, classify(loop, is_pointwise_op))) if config.batch_time else None
    rerolled, refused = reroll(work, lambda loop: why_not(loop, config), config.min_steps, layers)
    loops += rerolled
    drop_idle_detaches(work.graph)
    report.loops, report.rejections = loops, report.rejections + rejections + refused
    counters["snn_compile"]["loops_rerolled"] += len(loops)
    _specialize_steps_with_calls(work, config)
    dump(work, "2_reroll")
    for call, loop in loop_calls(work):
        counters["snn_compile"]["consumers_fused"] += fuse_consumers(work, call, loop, is_pointwise_op)
        counters["snn_compile"]["producers_fused"] += fuse_producers(work, call, loop)
    if config.batch_time:
        _chunk_time(work, config)
    for call, loop in loop_calls(work):
        counters["snn_compile"]["batch_norms_folded"] += fold_batch_norm(loop, is_pointwise_op)
        infos = classify(loop, is_pointwise_op)
        report.ops_hoisted += hoist(work, call, loop, infos)
        consts = loop.placeholders()[len(loop.carries) + len(loop.xs) :]
        distribute(work, call, loop, infos, partial(normalises_for, consts))
    counters["snn_compile"]["ops_hoisted"] += report.ops_hoisted
    dump(work, "3_distribute")
    if config.batch_time:
        _batch_time(work, report)
        dump(work, "4_batch_time")
    _lower(work, report, dump, config)
    counters["snn_compile"]["convolutions_replaced"] += report.convolutions_replaced
    dump(work, "5_lower")
    counters["snn_compile"]["rejections"] += len(report.rejections)
    _rewrite_inner(work, config, report)
    if not report.recurrences and not report.stepped and not report.convolutions_replaced and not scans:
        return report
    if (left := _unroll(work)) is not None:
        return _nothing_done(report, left, counted)
    restore_writes(work, is_kernel)
    counters["snn_compile"]["convolutions_channels_last"] += channels_last(work.graph, is_kernel, max_pool2d)
    separate_saved_statistics(work)
    separate_saved(work.graph, saved_operands)
    separate_results(work.graph, given)
    _finish(work)
    dump(work, "6_unroll")
    report.changed = True
    return report


def _unroll(gm: fx.GraphModule) -> Rejection | None:
    """Nothing could be made of these loops: they are plain ops again; gives one of unknown length, which cannot be."""
    for call, loop in loop_calls(gm):
        length = specialize_length(loop.length)
        if length is None:
            reason = "a part of a scan that is not compiled, over steps whose number is not known"
            return Rejection(reason, call.name, loop.location, "do without torch._dynamo.mark_dynamic and dynamic=True")
        loop.length = length
        unroll(gm, call, loop)
    return None


def _nothing_done(report: Report, why: Rejection, counted: dict[str, int]) -> Report:
    """What there is to say of a graph that goes back to what it was after all. `counted`: all counters as they were before."""
    counters["snn_compile"].clear()
    counters["snn_compile"].update(counted)
    counters["snn_compile"]["rejections"] += len(report.rejections) + 1
    return Report(rejections=[*report.rejections, why])


class _Backup:
    """The graph as Dynamo gave it, to go back to where nothing was lowered."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.graph, env = gm, fx.Graph(), dict[fx.Node, fx.Node]()
        self.graph.output(self.graph.graph_copy(gm.graph, env))
        self.children = dict(gm.named_children())
        for old, new in env.items():
            new.meta = copy.copy(old.meta)
            for key, value in vars(old).items():
                if key.startswith("_dynamo"):
                    setattr(new, key, value)

    def restore(self) -> None:
        for name, child in self.children.items():
            self.gm.add_submodule(name, child)
        self.gm.graph = self.graph
        delete_unused_children(self.gm)


#: Higher-order ops that run their body as it is: a loop inside is a loop like any other.
_REGIONS = (*REGIONS, "invoke_subgraph")


def _rewrite_inner(gm: fx.GraphModule, config: Config, report: Report) -> None:
    """The pipeline on the bodies of regions such as `torch.utils.checkpoint`."""
    for node in gm.graph.nodes:
        if not is_region(node, _REGIONS):
            continue
        name = node.args[0].target
        with under(regions(node)):
            new, inner = run_pipeline(getattr(gm, name), config)
        setattr(gm, name, new)
        report.loops += inner.loops
        report.recurrences += inner.recurrences
        report.stepped += inner.stepped
        report.rejections += inner.rejections
        report.ops_hoisted += inner.ops_hoisted
        report.ops_time_batched += inner.ops_time_batched
        report.convolutions_replaced += inner.convolutions_replaced


def _specialize_steps_with_calls(gm: fx.GraphModule, config: Config) -> None:
    for call, loop in loop_calls(gm):
        infos = classify(loop, is_pointwise_op)
        groups = [g for g in find_groups(loop, infos) if not g.is_kernel]
        if not loop.is_shorter(config.step_from) and may_step(loop, groups, infos):
            inits, xs, consts = loop.split([example(a) for a in call.args])
            specialize_sizes([*inits, *(x.select(0, 0) for x in xs), *consts])


def _chunk_time(gm: fx.GraphModule, config: Config) -> None:
    """Where nothing is differentiated: values of all steps may be too many, and nobody needs them later."""
    for call, loop in loop_calls(gm):
        wanted = any(isinstance(v, torch.Tensor) and v.requires_grad for v in map(example, flat_nodes(call.args)))
        if not (torch.is_grad_enabled() and wanted):
            length = chunk_length(loop, classify(loop, is_pointwise_op), config.time_chunk)
            counters["snn_compile"]["loops_chunked"] += len(chunk_time(gm, call, loop, length)) > 1


def _batch_time(gm: fx.GraphModule, report: Report) -> None:
    for call, loop in loop_calls(gm):
        if loop.is_recurrent:
            continue
        shift_series(gm, call, loop)
        try:
            count = batch_time(gm, call, loop, classify(loop, is_pointwise_op))
        except Reject as r:
            report.rejections.append(r.rejection)
            continue
        report.ops_time_batched += count
        counters["snn_compile"]["ops_time_batched"] += count


def _lower(gm: fx.GraphModule, report: Report, dump: Dump, config: Config) -> None:
    found = {t.call: t.recurrence for t in _trace(gm, report, config)}
    for call, loop in loop_calls(gm):
        if loop.is_recurrent and not loop.is_kernel:
            count = replace_convolutions_at_one_position(loop.body)
            report.convolutions_replaced += count
            infos = classify(loop, is_pointwise_op)
            if all(n.target in VIEWS for n in infos):  # (it computes nothing)
                continue
            if not loop.is_shorter(config.step_from) or runs_by_channel(list(infos), infos):
                _lower_stepped(gm, call, loop, infos, report, dump)
            elif count:
                reason = "a state goes through a convolution from step to step: unrolled, as the product of matrices that it is"
                report.rejections.append(Rejection(reason, call.name, loop.location, step_from(loop)))
            elif (refused := why_unrolled(loop, list(infos), infos)) is not None:
                report.rejections.append(refused)
        if call in found:
            recurrence = found[call]
            _describe(recurrence, call, loop)
            dump.kernels(recurrence)
            lower_loop(gm, call, loop, register(recurrence, targets.for_device), recurrence.backward is not None)
            report.recurrences.append(recurrence)
            counters["snn_compile"]["recurrences_lowered"] += 1


def _trace(gm: fx.GraphModule, report: Report, config: Config) -> list[Traced]:
    """The recurrences that can be kernels, those over one series fused."""
    traced = []
    for call, loop in loop_calls(gm):
        if not loop.is_kernel:
            continue
        try:
            recurrence = make_recurrence(call, loop, torch.is_grad_enabled())
            recurrence.meta["target"] = targets.for_operands(call, recurrence.location).name
        except Reject as r:
            report.rejections.append(replace(r.rejection, location=r.rejection.location or loop.location))
            continue
        if config.fold_batch_norm == "threshold":
            count, refused = fold_threshold(gm, call, recurrence)
            counters["snn_compile"]["thresholds_folded"] += count
            report.rejections += refused
        traced.append(Traced(call, recurrence, loop.length))
    fused = fuse_recurrences(gm, traced)
    counters["snn_compile"]["recurrences_fused"] += len(traced) - len(fused)
    return fused


def _lower_stepped(
    gm: fx.GraphModule, call: fx.Node, loop: Loop, infos: dict[fx.Node, OpInfo], report: Report, dump: Dump
) -> None:
    by_channel = runs_by_channel(list(infos), infos)
    try:
        grow_states(gm, call, loop, infos)
        carry_statistics(gm, call, loop)
        stepped = make_stepped(call, loop, torch.is_grad_enabled(), by_channel)
        target = targets.for_operands(call, stepped.location)
    except Reject as r:
        report.rejections.append(replace(r.rejection, location=r.rejection.location or loop.location))
        return
    stepped.meta |= {"steps": loop.length, "target": target.name, "is_by_channel": by_channel}
    dump.kernels(stepped)
    lower_loop(gm, call, loop, register_stepped(stepped, targets.for_device), stepped.backward is not None)
    report.stepped.append(stepped)
    counters["snn_compile"]["recurrences_stepped"] += 1


def _describe(recurrence: Recurrence, call: fx.Node, loop: Loop) -> None:
    """What reports and the comments of kernels say about it."""
    operands = [example(a) for a in call.args]
    recurrence.meta |= {"steps": loop.length, "operands": operands}
    recurrence.meta["shape"] = recurrence.shape_hint(operands)
    recurrence.equations = tuple(map(str, equations(recurrence)))


def _finish(gm: fx.GraphModule) -> None:
    restore_regions(gm.graph)
    for node in reversed(list(gm.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            gm.graph.erase_node(node)
    delete_unused_children(gm)  # a loop that is left here could not be pickled, and AOTAutograd's cache would give up
    gm.graph.lint()
    gm.recompile()
