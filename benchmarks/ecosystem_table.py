"""Write `docs/ecosystem_table.md`: what becomes of other libraries' models: ``python benchmarks/ecosystem_table.py``."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from pathlib import Path

import _harness as h
import torch

from snn_compile.explain import explain

sys.path.insert(0, str(Path(__file__).parent.parent))  # the models are those of the tests
from tests.ecosystem.models import Model, models
from tests.ecosystem.test_models import both

DOCS = Path(__file__).parent.parent / "docs"
LIBRARIES = ("snntorch", "spikingjelly", "norse", "sinabs")


def row(model: Model) -> dict[str, str]:
    torch._dynamo.reset()
    (values, gradients), (got, got_gradients) = both(model)
    pairs = [(a, b) for a, b in zip(gradients, got_gradients, strict=True) if a is not None and b is not None]
    error = max((float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs), default=0.0)
    torch._dynamo.reset()
    torch.manual_seed(0)
    found = explain(model.make(), step_from=4)(model.inputs())
    kinds = {"kernel": len(found.recurrences), "program of kernels and calls": len(found.stepped)}
    compiled = ", ".join(f"{n} {kind}{'s' if n > 1 and kind == 'kernel' else ''}" for kind, n in kinds.items() if n)
    return {
        "library": model.library,
        "model": model.name,
        "compiled": compiled or f"by Inductor: {model.reason}",
        "forward": "bit for bit" if all(map(torch.equal, values, got)) else "differs",
        "gradient error": f"{error:.0e}",
    }


def main() -> None:
    logging.disable(logging.WARNING)
    rows = []
    for model in models():
        rows.append(row(model))
        print(h.markdown(rows[-1:], list(rows[-1])).splitlines()[-1], flush=True)
    machine = h.machine()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    text = f"""# Models of other libraries

Written by `python benchmarks/ecosystem_table.py`; each row is also a test (`tests/ecosystem`). {versions}, torch
{machine["torch"]}, {machine["machine"]}, {machine["date"]}. The gradient error is relative to the largest gradient of a tensor.

{h.markdown(rows, list(rows[0]))}
"""
    (DOCS / "ecosystem_table.md").write_text(text)


if __name__ == "__main__":
    main()
