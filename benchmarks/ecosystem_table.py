"""Write `docs/ecosystem_table.md`: what becomes of other libraries' models: ``python benchmarks/ecosystem_table.py``."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import _harness as h
import torch
from _device import machine
from _results import markdown, read, write
from torch import Tensor, nn

from snn_compile.backend import snn
from snn_compile.explain import explain

sys.path.insert(0, str(Path(__file__).parent.parent))  # the models are those of the tests
from tests.ecosystem import models as sizes
from tests.ecosystem.models import Model, models
from tests.ecosystem.test_models import both, results

DOCS = Path(__file__).parent.parent / "docs"
#: [T, B, N] of the inputs that are timed
SIZES = (16, 32, 256)
COLUMNS = ["library", "model", "compiled", "forward", "gradient error", "first call", "step", "vs eager", "vs Inductor"]
LIBRARIES = ("snntorch", "spikingjelly", "norse", "sinabs", "tracetorch")


def row(model: Model) -> dict[str, str]:
    torch._dynamo.reset()
    (values, gradients), (got, got_gradients) = both(model)
    pairs = [(a, b) for a, b in zip(gradients, got_gradients, strict=True) if a is not None and b is not None]
    error = max((float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs), default=0.0)
    apart = max(float((a - b).detach().abs().max()) for a, b in zip(values, got, strict=True))
    torch._dynamo.reset()
    torch.manual_seed(0)
    found = explain(model.build(), step_from=4)(model.inputs())
    kinds = {"kernel": len(found.recurrences), "program of kernels and calls": len(found.stepped)}
    compiled = ", ".join(f"{n} {kind}{'s' if n > 1 and kind == 'kernel' else ''}" for kind, n in kinds.items() if n)
    return {
        "library": model.library,
        "model": model.name,
        "compiled": compiled or f"by Inductor: {model.reason}",
        "forward": "bit for bit" if all(map(torch.equal, values, got)) else f"within {apart:.0e}",
        "gradient error": f"{error:.0e}",
    }


def step(module: nn.Module, x: Tensor, run: Callable[..., object]) -> object:
    """Forward and backward from the initial state, by the library's own reset functions."""
    for part in module.modules():
        for name in ("reset", "reset_states", "zero_states"):
            if callable(method := getattr(part, name, None)):
                method()
    return results(module, x, run)


def speed(model: Model) -> dict[str, str]:
    """Seconds of the first training step, and how many times faster than eager and Inductor the next ones are."""
    runs, first = {}, 0.0
    for name, backend in (("eager", None), ("inductor", "inductor"), ("snn", snn)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        module, x = model.build(), model.inputs()
        run = module if backend is None else torch.compile(module, backend=backend)  # type: ignore[call-overload]
        runs[name] = functools.partial(step, module, x, run)
        _, first = h.first_call(runs[name])
    times = h.medians(h.interleaved(runs, rounds=9))
    return {
        "first call": f"{first:.1f} s",
        "step": f"{times['snn'] * 1e3:.2f} ms",
        "vs eager": f"{times['eager'] / times['snn']:.1f}",
        "vs Inductor": f"{times['inductor'] / times['snn']:.1f}",
    }


def measured(models_: list[Model], start: list[dict[str, str]], with_speed: bool) -> list[dict[str, str]]:
    """All columns of each model, written to `benchmarks/results/ecosystem_cpu.csv` as they come; `start` is not done again."""
    rows = {(r["library"], r["model"]): r for r in start}
    small, large = (sizes.T, sizes.B, sizes.N), SIZES
    for model in models_:
        key = model.library, model.name
        if key in rows and (rows[key]["step"] or not with_speed):
            continue
        if key not in rows:
            sizes.T, sizes.B, sizes.N = small
            rows[key] = dict.fromkeys(COLUMNS, "") | row(model)
        if with_speed:
            sizes.T, sizes.B, sizes.N = large
            rows[key] |= speed(model)
        print(markdown([rows[key]], COLUMNS).splitlines()[-1], flush=True)
        write("ecosystem_cpu", list(rows.values()))
    return [rows[m.library, m.name] for m in models_]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resume", action="store_true", help="keep the rows of the last run that are in the CSV file")
    parser.add_argument("--without-speed", action="store_true", help="leave the last columns of new rows empty, for a later run")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = measured(list(models()), read("ecosystem_cpu") if args.resume else [], not args.without_speed)
    about = machine()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    text = f"""# Models of other libraries

Written by `python benchmarks/ecosystem_table.py`; each row is also a test (`tests/ecosystem`). {versions}, torch
{about["torch"]}, {about["machine"]}, {about["date"]}. The gradient error is relative to the largest gradient of a tensor.
"Prepared": after `snn_compile.compat.prepare` ([ecosystem.md](ecosystem.md)). Speeds are those of a training step over inputs
{list(SIZES)}, medians of interleaved runs.
The first call is trace and compilation. A row without them is checked, and not timed yet.

{markdown(rows, COLUMNS)}
"""
    (DOCS / "ecosystem_table.md").write_text(text)


if __name__ == "__main__":
    main()
