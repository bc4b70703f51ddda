"""THE list of passes, in order, and how a graph goes through them."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._logging import getArtifactLogger

from snn_compile.config import Config
from snn_compile.errors import Reject, Rejection
from snn_compile.ir.equations import equations
from snn_compile.ir.loop import Loop
from snn_compile.ir.recurrence import Recurrence
from snn_compile.ir.stepped import SteppedRecurrence
from snn_compile.ir.values import base_name, example, flat_nodes
from snn_compile.lowering import ops, targets
from snn_compile.lowering.by_channel import suits_channels
from snn_compile.lowering.channel_program import channel_shapes
from snn_compile.lowering.kernel_texts import kernel_texts, stepped_texts
from snn_compile.lowering.launch import Direction
from snn_compile.lowering.lower_loops import lower_loop, make_recurrence, make_stepped
from snn_compile.lowering.max_pool import max_pool2d
from snn_compile.lowering.register_stepped import register_stepped
from snn_compile.lowering.registration import is_kernel, register, saved_operands
from snn_compile.passes.batch_time import batch_time
from snn_compile.passes.carry_statistics import (
    carry_statistics,
    separate_saved_statistics,
    updates_statistics,
    why_not_carried,
)
from snn_compile.passes.channels_last import channels_last
from snn_compile.passes.chunk_time import chunk_length, chunk_time
from snn_compile.passes.classify import OpInfo, classify
from snn_compile.passes.convolutions_at_one_position import is_at_one_position, replace_convolutions_at_one_position
from snn_compile.passes.decompose import decompose
from snn_compile.passes.distribute import Group, distribute, find_groups
from snn_compile.passes.emit import delete_unused_children
from snn_compile.passes.fold_batch_norm import fold_batch_norm
from snn_compile.passes.fold_threshold import fold_threshold
from snn_compile.passes.function_transforms import why_transformed
from snn_compile.passes.functionalize import functionalize
from snn_compile.passes.fuse_consumers import fuse_consumers
from snn_compile.passes.fuse_producers import fuse_producers
from snn_compile.passes.fuse_recurrences import Traced, fuse_recurrences
from snn_compile.passes.grow_states import grow_states
from snn_compile.passes.hoist import find_invariant, hoist
from snn_compile.passes.hoist_creations import hoist_creations
from snn_compile.passes.index_steps import index_steps, index_stores
from snn_compile.passes.inline_detached import inline_detached
from snn_compile.passes.inline_steps import inline_steps
from snn_compile.passes.merge_views import merge_views
from snn_compile.passes.move_own_layers import move_own_layers
from snn_compile.passes.no_grad_regions import drop_idle_detaches
from snn_compile.passes.read_steps_in_regions import REGIONS, is_region, read_steps_in_regions
from snn_compile.passes.reroll import reroll
from snn_compile.passes.roll_scan import roll_scans
from snn_compile.passes.separate_results import results_of, separate_results
from snn_compile.passes.separate_saved import separate_saved
from snn_compile.passes.specialize import (
    drop_unread_sizes,
    fold_sizes,
    name_allowed_functions,
    specialize_floats,
    specialize_sizes,
)
from snn_compile.passes.unroll import restore_writes, unroll
from snn_compile.passes.work_on_copies import work_on_copies

log = logging.getLogger("snn_compile")
#: ``TORCH_LOGS=output_code`` shows the kernels beside Inductor's own output
kernel_log = getArtifactLogger("torch._inductor.snn_compile", "output_code")

#: Fewer ops than this, in all steps of a loop, are no neuron: a sum of two losses, two residuals.
FEWEST_OPS = 4

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
    #: loops or groups as Rejection-like lines: what was left to Inductor inside rerolled loops
    steps: dict[str, int] = field(default_factory=dict)
    ops_hoisted: int = 0
    ops_time_batched: int = 0
    convolutions_replaced: int = 0
    changed: bool = False


#: Pointwise ops without PyTorch's tag for them (all but hardswish have it in torch 2.13).
UNTAGGED = ("hardswish.default", "leaky_relu.default", "elu.default", "gelu.default")


def is_pointwise_op(op: torch._ops.OpOverload) -> bool:
    """Whether a kernel can hold this overload, as it is or after decomposition."""
    name = ops.overload_name(op)
    return name in ops.TABLE or name in ops.CONSTANTS or name in UNTAGGED or torch.Tag.pointwise in op.tags


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
    report = Report()
    dump = _Dump(config.dump)
    dump(work, "0_dynamo")
    if (transformed := why_transformed(work.graph)) is not None:
        report.rejections.append(transformed)
        counters["snn_compile"]["rejections"] += 1
        return report
    given = results_of(work.graph)
    inline_steps(work)
    read_steps_in_regions(work)
    specialize_floats(work)
    fold_sizes(work)
    drop_unread_sizes(work)
    name_allowed_functions(work)
    decomposed, refused = decompose(work)
    report.rejections += refused
    counters["snn_compile"]["ops_decomposed"] += decomposed
    work_on_copies(work.graph)
    inline_detached(work)
    merge_views(work.graph)
    index_steps(work)
    functionalize(work)
    index_stores(work)
    hoist_creations(work)
    counters["snn_compile"]["layers_moved"] += move_own_layers(work)
    dump(work, "1_functionalize")
    loops, rejections = roll_scans(work, lambda loop: _why_not(loop, config), config.min_steps)
    rerolled, refused = reroll(work, lambda loop: _why_not(loop, config), config.min_steps)
    loops += rerolled
    drop_idle_detaches(work.graph)
    report.loops, report.rejections = loops, report.rejections + rejections + refused
    counters["snn_compile"]["loops_rerolled"] += len(loops)
    _specialize_steps_with_calls(work, config)
    dump(work, "2_reroll")
    for call, loop in _calls(work):
        counters["snn_compile"]["consumers_fused"] += fuse_consumers(work, call, loop, is_pointwise_op)
        counters["snn_compile"]["producers_fused"] += fuse_producers(work, call, loop)
    if config.batch_time:
        _chunk_time(work, config)
    for call, loop in _calls(work):
        counters["snn_compile"]["batch_norms_folded"] += fold_batch_norm(loop, is_pointwise_op)
        infos = classify(loop, is_pointwise_op)
        report.ops_hoisted += hoist(work, call, loop, infos)
        consts = loop.placeholders()[len(loop.carries) + len(loop.xs) :]
        distribute(work, call, loop, infos, partial(_normalises_for, consts))
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
    if not report.recurrences and not report.stepped and not report.convolutions_replaced:
        return report
    for call, loop in _calls(work):
        unroll(work, call, loop)
    restore_writes(work, is_kernel)
    counters["snn_compile"]["convolutions_channels_last"] += channels_last(work.graph, is_kernel, max_pool2d)
    separate_saved_statistics(work)
    separate_saved(work.graph, saved_operands)
    separate_results(work.graph, given)
    _finish(work)
    dump(work, "6_unroll")
    report.changed = True
    return report


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
        new, inner = run_pipeline(getattr(gm, name), config)
        setattr(gm, name, new)
        report.loops += inner.loops
        report.recurrences += inner.recurrences
        report.stepped += inner.stepped
        report.rejections += inner.rejections
        report.ops_hoisted += inner.ops_hoisted
        report.ops_time_batched += inner.ops_time_batched
        report.convolutions_replaced += inner.convolutions_replaced


def _calls(gm: fx.GraphModule) -> list[tuple[fx.Node, Loop]]:
    return [
        (n, getattr(gm, n.target)) for n in gm.graph.nodes if n.op == "call_module" and isinstance(getattr(gm, n.target), Loop)
    ]


def _why_not(loop: Loop, config: Config) -> Rejection | None:
    """A loop is rerolled where at least one recurrence in it can become a kernel."""
    infos = classify(loop, is_pointwise_op)
    groups = find_groups(loop, infos, ignore=find_invariant(loop, infos))
    kernels = [g for g in groups if g.is_kernel and not _counts(g)]
    count = loop.length * sum(len(g.nodes) for g in kernels)
    if kernels and count < FEWEST_OPS:
        reason = f"{loop.length} steps of {count // loop.length} ops: Inductor fuses them as they are"
        return Rejection(reason, loop.name, loop.location)
    if kernels:
        return _why_growing(loop, groups)
    is_long = loop.length >= config.step_from

    def gains(group: Group) -> bool:  # (a product in place of a convolution is worth it unrolled, too)
        return is_long or _runs_by_channel(group.nodes, infos) or any(map(is_at_one_position, group.nodes))

    if any(g.recurrent and gains(g) for g in groups) and _may_step(groups, infos):
        return _why_growing(loop, groups)
    worst = next((n for g in groups if g.recurrent for n in g.nodes if not infos[n].pointwise), None)
    if worst is not None:
        hint = _CHECKPOINT if _is_checkpoint(worst) else _step_from(loop) if _may_step(groups, infos) else ""
        return _goes_through(worst, loop, hint)
    return Rejection("nothing is carried from step to step", loop.name, loop.location)


def _counts(group: Group) -> bool:
    """One integer, such as the number of batches that a batch norm has seen: no neuron."""
    values = [example(n) for n in group.nodes]
    return all(isinstance(v, torch.Tensor) and v.dim() == 0 and not v.is_floating_point() for v in values)


def _goes_through(node: fx.Node, loop: Loop, hint: str) -> Rejection:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return Rejection(f"a state goes through '{name}' from step to step, which is not pointwise", node.name, loop.location, hint)


_CHECKPOINT = "a kernel saves no more of a step than torch.utils.checkpoint does: call the step without, or the whole loop in one"


def _is_checkpoint(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() == "tag_activation_checkpoint"


def _step_from(loop: Loop) -> str:
    return f"options={{'step_from': {loop.length}}} runs it as a program of kernels and calls"


def _may_step(groups: list[Group], infos: dict[fx.Node, OpInfo]) -> bool:
    """Whether a recurrence that is no kernel can be a program of kernels and calls: nothing in it writes or draws numbers."""
    return any(g.recurrent and all(infos[n].pure or updates_statistics(n) for n in g.nodes) for g in groups)


def _specialize_steps_with_calls(gm: fx.GraphModule, config: Config) -> None:
    for call, loop in _calls(gm):
        infos = classify(loop, is_pointwise_op)
        groups = [g for g in find_groups(loop, infos) if not g.is_kernel]
        if loop.length >= config.step_from and _may_step(groups, infos):
            specialize_sizes(map(example, flat_nodes(call.args)))


def _runs_by_channel(nodes: list[fx.Node], infos: dict[fx.Node, OpInfo]) -> bool:
    """All that is not pointwise are batch norms over channels, where a kernel runs channel by channel (`lowering/by_channel`)."""
    calls = [n for n in nodes if not infos[n].pointwise]
    return bool(calls) and all(updates_statistics(n) and suits_channels(example(n.args[0])) for n in calls)


def _normalises_for(consts: Sequence[fx.Node], group: Group, neuron: Group) -> bool:
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


def _chunk_time(gm: fx.GraphModule, config: Config) -> None:
    """Where nothing is differentiated: values of all steps may be too many, and nobody needs them later."""
    for call, loop in _calls(gm):
        wanted = any(isinstance(v, torch.Tensor) and v.requires_grad for v in map(example, flat_nodes(call.args)))
        if not (torch.is_grad_enabled() and wanted):
            length = chunk_length(loop, classify(loop, is_pointwise_op), config.time_chunk)
            counters["snn_compile"]["loops_chunked"] += len(chunk_time(gm, call, loop, length)) > 1


def _batch_time(gm: fx.GraphModule, report: Report) -> None:
    for call, loop in _calls(gm):
        if loop.is_recurrent:
            continue
        try:
            count = batch_time(gm, call, loop, classify(loop, is_pointwise_op))
        except Reject as r:
            report.rejections.append(r.rejection)
            continue
        report.ops_time_batched += count
        counters["snn_compile"]["ops_time_batched"] += count


def _lower(gm: fx.GraphModule, report: Report, dump: _Dump, config: Config) -> None:
    found = {t.call: t.recurrence for t in _trace(gm, report, config)}
    for call, loop in _calls(gm):
        if loop.is_recurrent and not loop.is_kernel:
            count = replace_convolutions_at_one_position(loop.body)
            report.convolutions_replaced += count
            infos = classify(loop, is_pointwise_op)
            if loop.length >= config.step_from or _runs_by_channel(list(infos), infos):
                _lower_stepped(gm, call, loop, infos, report, dump)
            elif count:
                reason = "a state goes through a convolution from step to step: unrolled, as the product of matrices that it is"
                report.rejections.append(Rejection(reason, call.name, loop.location, _step_from(loop)))
            elif (worst := next((n for n in infos if not infos[n].pointwise), None)) is not None:
                report.rejections.append(_goes_through(worst, loop, _step_from(loop)))
        if call in found:
            recurrence = found[call]
            report.steps[recurrence.name] = loop.length
            _describe(recurrence, call, loop)
            dump.kernels(recurrence)
            lower_loop(gm, call, loop, register(recurrence, targets.for_device), recurrence.backward is not None)
            report.recurrences.append(recurrence)
            counters["snn_compile"]["recurrences_lowered"] += 1


def _trace(gm: fx.GraphModule, report: Report, config: Config) -> list[Traced]:
    """The recurrences that can be kernels, those over one series fused."""
    traced = []
    for call, loop in _calls(gm):
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
    gm: fx.GraphModule, call: fx.Node, loop: Loop, infos: dict[fx.Node, OpInfo], report: Report, dump: _Dump
) -> None:
    by_channel = _runs_by_channel(list(infos), infos)
    try:
        grow_states(gm, call, loop, infos)
        carry_statistics(gm, call, loop)
        stepped = make_stepped(call, loop, torch.is_grad_enabled(), by_channel)
        target = targets.for_operands(call, stepped.location)
    except Reject as r:
        report.rejections.append(replace(r.rejection, location=r.rejection.location or loop.location))
        return
    stepped.meta |= {"steps": loop.length, "target": target.name, "is_by_channel": by_channel}
    dump.stepped(stepped)
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
    for node in reversed(list(gm.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            gm.graph.erase_node(node)
    delete_unused_children(gm)  # a loop that is left here could not be pickled, and AOTAutograd's cache would give up
    gm.graph.lint()
    gm.recompile()


class _Dump:
    """``SNN_COMPILE_DUMP=dir``: the graph after every pass and the kernels, in files of this process's own."""

    count = 0

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory) if directory else None
        if self.directory is not None:
            _Dump.count += 1
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                log.warning("cannot write the dump: %s", error)
                self.directory = None
        self.graph = _Dump.count

    def __call__(self, gm: fx.GraphModule, name: str) -> None:
        if self.directory is None:
            return
        text = [str(gm.graph)] + [str(loop) for _, loop in _calls(gm)]
        self._write(f"{name}.txt", "\n\n".join(text))

    def kernels(self, recurrence: Recurrence) -> None:
        if self.directory is not None or kernel_log.isEnabledFor(10):
            self._kernels(recurrence, [(direction, direction, text) for direction, text in kernel_texts_for_logs(recurrence)])

    def stepped(self, stepped: SteppedRecurrence) -> None:
        if self.directory is not None or kernel_log.isEnabledFor(10):
            texts = enumerate(stepped_texts_for_logs(stepped))
            self._kernels(stepped, [(direction, f"{direction}_{i}", text) for i, (direction, text) in texts])

    def _kernels(self, of: Recurrence | SteppedRecurrence, texts: list[tuple[Direction, str, str]]) -> None:
        for direction, name, text in texts:
            kernel_log.debug("kernel of %s, %s:\n%s", of.name, direction, text)
            if self.directory is not None:
                self._write(f"kernel_{of.name}_{name}.{'cpp' if of.meta['target'] == 'cpp' else 'py'}", text)

    def _write(self, name: str, text: str) -> None:
        try:
            (self.directory / f"process_{os.getpid()}_graph_{self.graph}_{name}").write_text(text, "utf-8")  # type: ignore[operator]
        except OSError as error:  # a full disk must not stop a compilation
            log.warning("cannot write the dump: %s", error)


def kernel_texts_for_logs(recurrence: Recurrence) -> list[tuple[Direction, str]]:
    """The recurrence's kernels as text; empty (and logged) where they cannot be written out."""
    try:
        return kernel_texts(recurrence, recurrence.meta["operands"], recurrence.meta["steps"])
    except Exception:
        log.debug("no kernel text for %s", recurrence.name, exc_info=True)
        return []


def stepped_texts_for_logs(stepped: SteppedRecurrence) -> list[tuple[Direction, str]]:
    try:
        return stepped_texts(stepped, stepped.meta["device"])
    except Exception:
        log.debug("no kernel texts for %s", stepped.name, exc_info=True)
        return []


PassFunction = Callable[[fx.GraphModule], object]
