"""`explain(fn)(*args)`: what was found, what became a kernel, what did not and why, and the kernels' text."""

from __future__ import annotations

import contextlib
import os
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

from snn_compile import backend
from snn_compile.errors import Rejection
from snn_compile.ir.equations import equations, operand_names
from snn_compile.ir.fire import op_name, passes_gradient, results, spike_of_state
from snn_compile.ir.loop import Loop
from snn_compile.ir.recurrence import Recurrence, Signature
from snn_compile.ir.slope import surrogate
from snn_compile.ir.stepped import SteppedRecurrence
from snn_compile.ir.stepped import describe as describe_unit
from snn_compile.ir.symbolic import is_affine
from snn_compile.ir.threshold import describe_thresholds
from snn_compile.ir.values import count_text, user_location
from snn_compile.lowering.dump import texts_for_logs
from snn_compile.passes.batch_time import NO_SERIES
from snn_compile.passes.loop_body import OWN_WEIGHTS, STEPS_OWN_WEIGHTS
from snn_compile.passes.reroll import ONLY_READS
from snn_compile.pipeline import Report

#: (fragment of a reason, what to change): for refusals that come without a hint of their own.
HINTS = (
    ("a Python number changes", "put the numbers into a tensor before the loop and read it with [t]"),
    ("not pointwise", "a step that only computes becomes a kernel or a program: no writes, no random numbers, no `.item()`"),
    ("no pointwise kernel can hold", "write the step with elementwise operations, or move this call out of the loop"),
    (
        STEPS_OWN_WEIGHTS,
        "share them between steps, or apply them to what no state goes through: `self.norms[t](x[t])`",
    ),
    ("another tensor in every step", "stack the tensors before the loop and read the stack with [t]"),
    ("do not follow one rule", "make every iteration run the same operations: no `if` on t, no list indexed by t"),
    ("nothing is carried", "no state passes from step to step: apply it to all steps at once"),
    ("a tensor that is written into", "hand values on in variables, and write into tensors that are made here: out[t] = s"),
    ("reads a value of the loop itself", "hand it from step to step in a variable, and write whole slices: out[t] = s"),
    ("moves with t", "read one step at a time, x[t]"),
    ("invalid gradient", "let the surrogate give its gradients of the step's shape: autograd sums each to its operand's shape"),
    ("complex dtype", "keep real and imaginary parts in two real tensors"),
)

#: The same for graph breaks: fragments of what Dynamo says.
BREAK_HINTS = (
    (
        "Tensor.item()",
        "keep numbers as numbers (`ctx.gamma = gamma`), or set torch._dynamo.config.capture_scalar_outputs = True",
    ),
    ("aten._local_scalar_dense", "a tensor as index is read back, as in `for t in torch.arange(T)`: loop over range(T)"),
    ("aten.nonzero", "v[mask] = v[mask] - 1 reads as many values as the data says: v = torch.where(mask, v - 1, v)"),
    ("python_type()", "Dynamo reads no attribute of an autograd.Function's class: keep the number outside of the class"),
)

#: The same, wherever they are: `compat.prepare` does not take these out of a library.
BREAK_HINTS_ANYWHERE = (
    ("RNN, GRU, or LSTM", "set torch._dynamo.config.allow_rnn = True, or use cells: torch.nn.RNNCell in a loop"),
    ("Tensor.tolist()", "a list of a tensor's values is read back in every step: keep them in the tensor"),
    ("RemovableHandle", "a hook that is registered in what is compiled ends the graph: register it before"),
)

#: Libraries of whose modules `compat.prepare` takes graph breaks out.
PREPARED = frozenset(("snntorch", "norse", "sinabs"))
#: What Dynamo says of ``self.spike = Spike()``, an instance of an `autograd.Function`, and ``self.spike.apply(v)``.
_FUNCTION_INSTANCE = "GetAttrVariable(AutogradFunctionVariable(), setup_context)"

_PREPARE = "model = snn_compile.compat.prepare(model), before it is compiled"
_OWN_STATE = "; where it has been, hand in the first state, as in cell(x[0], state): the module's own is marked in the graph"

#: What a graph break brings with it: a graph knows the values of the one before only as inputs.
_BROKEN = ("another tensor in every step", "Inductor fuses them as they are")

_LOOK_ALIKE = re.compile(r"\d+ look-alike groups of (\d+) ops")


@dataclass
class GraphBreak:
    """Where Dynamo ended a graph, so that a loop there could not be seen as a whole."""

    reason: str
    location: str = ""

    def __str__(self) -> str:
        return f"{_here(self.location) or 'somewhere'}: {self.reason}"

    @property
    def hint(self) -> str:
        """What to change; empty where that depends on the code."""
        if anywhere := _hint(self.reason, BREAK_HINTS_ANYWHERE):
            return anywhere
        if not PREPARED.isdisjoint(Path(self.location).parts) or _FUNCTION_INSTANCE in self.reason:
            return _PREPARE + (_OWN_STATE if "requires_grad" in self.reason else "")
        return _hint(self.reason, BREAK_HINTS)


@dataclass
class Explanation:
    """What `explain` found; `str()` of it is the report, `verbose()` the report with every refusal."""

    loops: list[Loop] = field(default_factory=list)
    recurrences: list[Recurrence] = field(default_factory=list)
    #: recurrences with calls in their step: programs of kernels and calls
    stepped: list[SteppedRecurrence] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    #: (name, "forward" or "backward", source text)
    kernels: list[tuple[str, str, str]] = field(default_factory=list)
    graph_breaks: list[GraphBreak] = field(default_factory=list)
    graphs: int = 0
    #: graphs that were handed to Inductor as they are because a pass of ours failed
    failures: int = 0

    def __str__(self) -> str:
        return self._text(self.important())

    def verbose(self) -> str:
        return self._text(self.rejections)

    def important(self) -> list[Rejection]:
        """The refusals without those that a rerolled loop, or no loop at all, brings with it."""
        lines = {user_location(n) for loop in self.loops for n in loop.body.graph.nodes} - {""}
        kept: dict[object, Rejection] = {}
        for r in self.rejections:  # of several readings of one line as a loop, the first: it covers most
            if not self._is_noise(r, lines):
                place = r.location if _LOOK_ALIKE.match(r.reason) else ""
                kept.setdefault(place or (r.reason, r.location), r)
        return list(kept.values())

    def _is_noise(self, rejection: Rejection, lines: set[str]) -> bool:
        if _is_no_loop(rejection):
            return True
        if self.graph_breaks and any(r in rejection.reason for r in _BROKEN):
            return True
        look_alike = _LOOK_ALIKE.match(rejection.reason)
        if look_alike and (int(look_alike[1]) <= 2 or (self.loops and rejection.location in lines)):
            return True
        if any(_is_read_otherwise(rejection, other) for other in self.rejections):
            return True
        if not self.loops:
            if look_alike and any(r.steps and r.ops >= rejection.ops / 2 for r in self.rejections if not _is_no_loop(r)):
                return True
            most = max((r.ops for r in self.rejections if not _is_no_loop(r)), default=0)
            return rejection.ops < most / 2
        step = max(len(loop.body.graph.nodes) for loop in self.loops)
        if 0 < rejection.ops <= step:  # layers that look alike, inside of one step
            return True
        searching = look_alike or "nothing is carried" in rejection.reason
        return bool(searching) or not rejection.location or any(r in rejection.reason for r in ("an index", NO_SERIES))

    def _text(self, rejections: list[Rejection]) -> str:
        parts = [self._headline(rejections)]
        parts += [describe(r) for r in self.recurrences]
        parts += [describe_stepped(r) for r in self.stepped]
        if self.graph_breaks:
            lines = ["Graph breaks (a loop with one inside cannot become a kernel):"]
            for hint in dict.fromkeys(b.hint for b in self.graph_breaks):
                lines += [f"  - {b}" for b in self.graph_breaks if b.hint == hint]
                lines += [f"    to change: {hint}"] if hint else []
            parts.append("\n".join(lines))
        if rejections:
            lines = ["Left to Inductor, with eager's meaning:"]
            parts.append("\n".join(lines + [f"  - {_refusal(r)}" for r in rejections]))
        if self.kernels:
            parts.append(f"Kernels: {len(self.kernels)}; read them in .kernels")
        return "\n\n".join(parts)

    def _headline(self, rejections: list[Rejection]) -> str:
        found = len(self.recurrences) + len(self.stepped)
        if found:
            return f"snn_compile: {_count(found, 'recurrence')} compiled, from {_count(len(self.loops), 'time loop')}"
        if self.failures:
            return "snn_compile: an internal failure (see the log, and please report it); the graph went to Inductor as it is"
        advice = "see below"
        if not rejections and not self.graph_breaks:
            advice = "the function must hold the loop over time itself, with a state that passes from step to step, in plain\n"
            advice += "code (a loop inside of an autograd.Function, or of an op of another library, is not looked into):\n"
            advice += "  for t in range(len(x)): v, s = step(v, x[t])"
        return f"snn_compile: no time loop was compiled; {advice}"


# --------------------------------------------------------------------------------------------------------- the report


def describe(recurrence: Recurrence) -> str:
    """One recurrence, for a reader who knows their own code but no compiler."""
    shape, steps = recurrence.meta.get("shape", ()), _steps(recurrence)
    lines = [f"{recurrence.name}: {_here(recurrence.location) or 'a loop of unknown place'}"]
    lines.append(f"  time steps   {steps}, each over {list(shape)} ({_dtype(recurrence)})")
    lines += _operands(recurrence)
    found = equations(recurrence)
    for i, line in enumerate(found):
        role = line.role if line.role and all(e.role != line.role for e in found[:i]) else ""
        lines.append(f"  {role:12} {line}")
    if any("H(" in line.text for line in found):
        lines.append(f"  {'':12} (H(u) is 1 where u >= 0, else 0)")
    lines += _analysis(recurrence)
    return "\n".join(lines)


def _steps(r: Recurrence | SteppedRecurrence) -> str:
    if "steps" not in r.meta:
        return "?"
    text = count_text(r.meta["steps"])
    return text if text.isdigit() else f"{text}, one for any number of them"


def describe_stepped(r: SteppedRecurrence) -> str:
    """One recurrence whose step is more than pointwise: what runs in a step, in order."""
    lines = [f"{r.name}: {_here(r.location) or 'a loop of unknown place'}"]
    lines.append(f"  time steps   {_steps(r)}, each a short program: its kernels and the calls between them")
    lines += _operands(r)
    if r.meta.get("is_by_channel"):
        lines.append(f"  {'runs':12} channel by channel: all steps and all of this as one kernel, where memory allows")
    programs = [("forward", r.forward)] + ([("backward", r.backward)] if r.backward is not None else [])
    for title, program in programs:
        for i, unit in enumerate(program.units):
            lines.append(f"  {'' if i else title:12} {describe_unit(unit)}")
    at_end = [way.kind for way in r.reduced if way is not None and way.kind != "sum"]
    if at_end:
        lines.append(f"  {'at the end':12} {_count(len(at_end), 'gradient')} of parameters, over all steps at once")
    lines.append(f"  {'target':12} {r.meta.get('target', '?')}{'' if r.backward is not None else ', forward only'}")
    return "\n".join(lines)


def _analysis(recurrence: Recurrence) -> list[str]:
    affine = is_affine(recurrence)
    lines = [] if affine is None else [f"  {'':12} the charge is {'' if affine else 'not '}affine in the states"]
    if recurrence.meta.get("thresholds_folded"):
        lines.append(f"  {'threshold':12} folded: sign and threshold are computed once a call, outside of the kernel")
    else:
        lines += [f"  {'threshold':12} on the raw potential: {text}" for text in describe_thresholds(recurrence)]
    slope = surrogate(recurrence)
    if slope:
        lines.append(f"  {'surrogate':12} ds/du = {slope}, where u is the argument of the spike")
    elif recurrence.backward is not None and not passes_gradient(recurrence) and spike_of_state(recurrence):
        lines.append(f"  {'surrogate':12} none: no gradient passes the spike")
    forward, backward = traffic(recurrence)
    moved = f"{forward:g} bytes forward" + (f", {backward:g} backward" if recurrence.backward is not None else "")
    lines.append(f"  {'memory':12} {moved}, per lane and step")
    only = "" if recurrence.backward is not None else ", forward only"
    lines.append(f"  {'target':12} {recurrence.meta.get('target', '?')}{only}")
    lines.append(f"  {'fused':12} {_fused(recurrence)}")
    return lines


def _operands(r: Signature) -> list[str]:
    """States, inputs and parameters, by the names that they have in the equations."""
    wanted = zip(operand_names(r), r.needs_grad, strict=True)
    parts = r.split([f"{name} (wants a gradient)" if wants else name for name, wants in wanted])
    titles = ("states", "inputs", "parameters")
    return [f"  {title:12} {', '.join(names)}" for title, names in zip(titles, parts, strict=True) if names]


def _dtype(recurrence: Recurrence) -> str:
    dtypes = dict.fromkeys([c.dtype for c in recurrence.carries] + [x.dtype for x in recurrence.xs])
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def traffic(recurrence: Recurrence) -> tuple[float, float]:
    """Bytes read and written per lane and step: what is read or written once a step, and nothing else."""
    operands = recurrence.meta.get("operands", [])[len(recurrence.carries) :]
    lanes = max(1, torch.Size(recurrence.meta.get("shape", ())).numel())
    read = written = 0.0
    for i, x in enumerate(recurrence.xs):
        example = operands[i] if i < len(operands) else None
        share = min(1.0, _lanes(example) / lanes) if isinstance(example, Tensor) else 1.0
        read += share * x.dtype.itemsize
        written += x.needs_grad * x.dtype.itemsize
    forward = read + sum(y.dtype.itemsize for y in recurrence.ys)
    backward = read + sum(y.dtype.itemsize for y in recurrence.differentiable_ys) + written
    return forward, backward


def _lanes(example: Tensor) -> int:
    sizes = [s if isinstance(s, int) else int(s.node.hint) for s in example.shape[1:]]
    return torch.Size(sizes).numel()


def _fused(recurrence: Recurrence) -> str:
    ops = [n for n in recurrence.step.graph.nodes if n.op == "call_function"]
    befores = recurrence.step.graph.find_nodes(op="placeholder")[: len(recurrence.carries)]
    states = zip(operand_names(recurrence), befores, results(recurrence.step), strict=False)
    totals = [name for name, before, after in states if _accumulates(before, after)]
    text = f"{_count(len(ops), 'op')} a step in one kernel"
    members = recurrence.meta.get("fused", [])
    if members:
        text += f", of {_count(len(members), 'recurrence')} over one series: {', '.join(_members(members))}"
    if totals:
        text += f"; {', '.join(totals)} summed in it, not stored step by step"
    return text


def _members(members: list[tuple[str, str]]) -> list[str]:
    """Names, with the place of those that are elsewhere than the first."""
    return [name if place == members[0][1] else f"{name} ({_here(place)})" for name, place in members]


def _accumulates(before: fx.Node, after: object) -> bool:
    """``acc' = acc + something``, with no other reader of acc."""
    return isinstance(after, fx.Node) and op_name(after) == "add" and before in after.args and len(before.users) == 1


def _is_read_otherwise(rejection: Rejection, other: Rejection) -> bool:
    """The same ops as a loop of fewer steps: from within a step on, or two of its steps as one."""
    return 0 < rejection.steps < other.steps and 0.8 < other.ops / max(rejection.ops, 1) < 1.25


def _is_no_loop(rejection: Rejection) -> bool:
    """Reads in a row, and layers that look alike, with the time loops inside of them."""
    return rejection.reason == ONLY_READS or OWN_WEIGHTS in rejection.reason


def _hint(reason: str, hints: Sequence[tuple[str, str]]) -> str:
    return next((hint for fragment, hint in hints if fragment in reason), "")


def _refusal(rejection: Rejection) -> str:
    hint = rejection.hint or _hint(rejection.reason, HINTS)
    place = f"{_here(rejection.location)}: " if rejection.location else ""
    reason = re.sub(r"<(?:built-in )?(?:function|method) (\w+)[^>]*>", r"\1", rejection.reason)
    return f"{place}{reason}" + (f"\n    to change: {hint}" if hint else "")


def _here(location: str) -> str:
    """The place relative to the working directory, where it lies inside of it."""
    root = os.getcwd() + os.sep
    return location.removeprefix(root) if location.startswith(root) else location


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


# ------------------------------------------------------------------------------------------------------------ running


def explain(fn: Callable[..., object], **options: object) -> Callable[..., Explanation]:
    """``explain(fn)(*args, **kwargs) -> Explanation``: compile `fn` for these arguments and say what became of it.

    `fn` is a function or a module, compiled already or not; `options` are those of ``torch.compile(options=...)``. It
    is run once; a module's attributes and buffers and the random state are put back afterwards.
    """

    def run(*args: object, **kwargs: object) -> Explanation:
        target = _original(fn)
        reports: list[Report] = []
        reasons: list[object] = []
        before, failed = _break_counts(), counters["snn_compile"]["pass_failures"]

        def collect(gm: fx.GraphModule, example_inputs: object) -> Callable[..., object]:
            known = len(reports)
            try:
                compiled = backend.snn(gm, example_inputs, options=dict(options) or None)  # type: ignore[arg-type]
            except torch._dynamo.exc.RestartAnalysis:  # Dynamo will trace it once more, with floats as tensors, say
                del reports[known:]
                raise
            reasons.append(getattr(gm, "compile_subgraph_reason", None))
            return compiled

        backend.listeners.append(reports.append)
        try:
            with _put_back(target), torch._dynamo.config.patch(recompile_limit=1024):
                torch.compile(target, backend=collect)(*args, **kwargs)
        finally:
            # by identity: two explanations may run at once
            backend.listeners[:] = [f for f in backend.listeners if getattr(f, "__self__", None) is not reports]
        made = _explanation(reports, _graph_breaks(reasons, before))
        made.failures = counters["snn_compile"]["pass_failures"] - failed
        return made

    return run


def _original(fn: Callable[..., object]) -> Callable[..., object]:
    """What was compiled, under a code object of its own, so that no compiled state is shared with the caller's."""
    fn = getattr(fn, "_orig_mod", fn)
    fn = getattr(fn, "_torchdynamo_orig_callable", fn)
    if not isinstance(fn, types.FunctionType):
        return fn
    copy = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__kwdefaults__ = fn.__kwdefaults__
    return copy


@contextlib.contextmanager
def _put_back(target: object) -> Iterator[None]:
    """A run inside leaves the module and the random state as they were."""
    modules = list(target.modules()) if isinstance(target, nn.Module) else []
    saved = [[(d, dict(d)) for d in (vars(m), *vars(m).values()) if type(d) is dict] for m in modules]
    buffers = [(b, b.detach().clone()) for m in modules for b in m._buffers.values() if b is not None]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for owner, state in (pair for pairs in saved for pair in pairs):
            owner.clear()
            owner.update(state)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _graph_breaks(reasons: list[object], before: dict[str, int]) -> list[GraphBreak]:
    found: dict[str, GraphBreak] = {}
    for reason in reasons:
        if reason is None or not getattr(reason, "graph_break", False):
            continue
        stack = getattr(reason, "user_stack", None) or []
        place = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else ""
        text = _short(getattr(reason, "reason", ""))
        found.setdefault(text, GraphBreak(text, place))
    for text, count in _break_counts().items():
        if count > before.get(text, 0):
            found.setdefault(_short(text), GraphBreak(_short(text), _place_in(text) or _place_of_failure(text)))
    return list(found.values())


def _place_of_failure(text: str) -> str:
    """Of a frame that Dynamo gave up for this reason, by its own account of compilations (private; tested on 2.11 to 2.15)."""
    metrics: list[object] = getattr(torch._dynamo.utils, "get_compilation_metrics", list)()
    for metric in reversed(metrics):
        file, line = (getattr(metric, f"fail_user_frame_{part}", None) for part in ("filename", "lineno"))
        if file and _short(getattr(metric, "fail_reason", None) or "") == _short(text):
            return f"{file}:{line}"
    return ""


def _break_counts() -> dict[str, int]:
    """Dynamo's reasons by number of times: breaks between graphs, and frames that it gave up because of one."""
    return {**counters["unimplemented"], **counters["graph_break"]}


def _short(text: str) -> str:
    """Dynamo's reason without its pages of advice."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    explained = next((line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")), "")
    first = lines[0] if lines else "unknown"
    return f"{first}: {explained}" if explained else first


def _place_in(text: str) -> str:
    found = re.findall(r'File "([^"]+)", line (\d+)', text) or re.findall(r"\((\S+\.py) line (\d+)\)", text)
    return f"{found[-1][0]}:{found[-1][1]}" if found else ""


def _explanation(reports: list[Report], graph_breaks: list[GraphBreak]) -> Explanation:
    made = Explanation(graph_breaks=graph_breaks, graphs=len(reports))
    seen: set[tuple[str, str]] = set()
    for report in reports:
        made.loops += report.loops
        made.recurrences += report.recurrences
        made.stepped += report.stepped
        for r in report.rejections:
            if (r.reason, r.location) not in seen:
                seen.add((r.reason, r.location))
                made.rejections.append(r)
    lowered: list[Recurrence | SteppedRecurrence] = [*made.recurrences, *made.stepped]
    made.kernels += [(of.name, direction, text) for of in lowered for direction, text in texts_for_logs(of)]
    return made
