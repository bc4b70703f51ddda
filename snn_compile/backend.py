"""``torch.compile(model, backend="snn")``: Dynamo graph -> pipeline -> Inductor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import fx
from torch._dynamo.utils import counters

from snn_compile.config import mode_options, parse_options
from snn_compile.pipeline import Report, run_pipeline

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

    config, patches = parse_options(options)
    patches = {**mode_options(mode), **patches}
    if config.enabled:
        gm = _rewrite(gm, config)
    return compile_fx(gm, example_inputs, config_patches=patches)  # type: ignore[arg-type]


def _rewrite(gm: fx.GraphModule, config) -> fx.GraphModule:  # type: ignore[no-untyped-def]
    try:
        new, report = run_pipeline(gm, config)
    except Exception:
        counters["snn_compile"]["pass_failures"] += 1
        if config.strict:
            raise
        log.exception("internal failure: this graph goes to Inductor as it is. Please report it with the graph:\n%s", gm.graph)
        return gm
    for rejection in report.rejections:
        log.info("left alone: %s", rejection)
    for listener in listeners:
        listener(report)
    return new
