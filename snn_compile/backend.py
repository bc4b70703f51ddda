"""``torch.compile(model, backend="snn")``: Dynamo graph -> pipeline -> Inductor."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._logging import trace_structured

from snn_compile.config import Config, mode_options, parse_options
from snn_compile.ir.values import count_text, example, known_int
from snn_compile.lowering.registration import is_kernel
from snn_compile.outer_loop import OuterLoopWatch, feeds_back, holds_no_loop
from snn_compile.pipeline import COUNTERS, Report, run_pipeline

log = logging.getLogger("snn_compile")

#: Called with the report of every graph; `explain` collects through it.
listeners: list[Callable[[Report], None]] = []


def snn(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    options: dict[str, object] | None = None,
    mode: str | None = None,
    **_: object,
) -> Callable[..., object]:
    """The backend: rewrites the time loops it can prove and hands everything to Inductor.

    Registered by entry point as ``"snn"``. Options are listed by `snn_compile.options()`; all others are Inductor's.
    """
    from torch._inductor.compile_fx import compile_fx

    for name in COUNTERS:
        counters["snn_compile"][name] += 0
    config, patches = parse_options(options)
    patches = {**mode_options(mode), **patches}
    stepwise = False
    if config.enabled:
        gm, report = _rewrite(gm, config)
        stepwise = report is not None and holds_no_loop(report.loops, report.rejections) and feeds_back(gm)
        patches = {**_layout_patches(gm), **patches}
    compiled = compile_fx(gm, example_inputs, config_patches=patches)  # type: ignore[arg-type]
    return OuterLoopWatch(compiled) if stepwise else compiled  # type: ignore[return-value, arg-type]


def _layout_patches(gm: fx.GraphModule) -> dict[str, object]:
    """No layout optimization of Inductor's where a kernel saves a 4-d series of a symbolic size beside a convolution.

    Inductor takes such a series for images that should lie channels-last, and fails to compare its strides: `ir.get_stride_order`
    is called without the sizes' `shape_env` (torch 2.11 and 2.13; 2.15 compiles it).
    """
    if torch.__version__ >= (2, 15):  # type: ignore[operator]
        return {}
    operands = [example(a) for n in gm.graph.nodes if is_kernel(n) for a in n.all_input_nodes]
    is_symbolic = any(isinstance(o, Tensor) and o.dim() == 4 and any(known_int(s) is None for s in o.shape) for o in operands)
    has_convolution = is_symbolic and any("conv" in getattr(n.target, "__name__", "") for n in gm.graph.nodes)
    return {"layout_optimization": False} if has_convolution else {}


def _rewrite(gm: fx.GraphModule, config: Config) -> tuple[fx.GraphModule, Report | None]:
    try:
        with _no_saved_tensors_hooks(), torch.autograd.set_detect_anomaly(False):  # (steps are differentiated on fake values)
            new, report = run_pipeline(gm, config)
    except Exception:
        counters["snn_compile"]["pass_failures"] += 1
        if config.strict:
            raise
        log.exception("internal failure: this graph goes to Inductor as it is. Please report it with the graph, %s", _kept(gm))
        return gm, None
    for made in report.lowered:
        log.info(
            "compiled: %s at %s, %s steps, %s", made.name, made.location, count_text(made.meta["steps"]), made.meta["target"]
        )
    for rejection in report.rejections:
        log.info("left alone: %s", rejection)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "snn_compile_report", "encoding": "string"},
        payload_fn=lambda: _summary(report),
    )
    for listener in listeners:
        listener(report)
    return new, report


def _kept(gm: fx.GraphModule) -> str:
    """Where the graph's text is: in a file, since an unrolled loop has thousands of lines."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="snn_compile_graph_", suffix=".txt", delete=False) as file:
            file.write(f"{gm.graph}\n")
    except OSError as error:
        return f"which could not be written to a file: {error}"
    return f"which is in {file.name}"


@contextmanager
def _no_saved_tensors_hooks() -> Iterator[None]:
    """The passes differentiate steps while the model's first call runs, and hooks around that call (`torch.utils.checkpoint`,
    `save_on_cpu`) are for what the model saves: hooks that do nothing take their place."""
    with ExitStack() as stack:
        with suppress(RuntimeError):  # hooks are disabled here, so none are set
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_itself, _itself))
        yield


def _itself(saved: Tensor) -> Tensor:
    return saved


def _summary(report: Report) -> str:
    lines = [f"{len(report.loops)} loops rerolled, {len(report.recurrences)} recurrences lowered"]
    for r in report.recurrences:
        lines.append(f"{r.name} at {r.location}: {count_text(r.meta['steps'])} steps, {r.meta.get('target')}")
        lines += [f"    {e}" for e in r.equations]
    return "\n".join([*lines, *(f"left alone: {r}" for r in report.rejections)])
