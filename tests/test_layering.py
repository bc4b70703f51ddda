"""Imports point one way: ir <- passes <- lowering <- pipeline <- backend; neurons and layers import none of them."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "snn_compile"
LINKED = ("passes", "lowering")

# A part is the first name below the package; parts not named here are "base": config, errors and other helpers.
MODULES = ("neuron", "layer", "surrogate", "functional", "tempotron", "compat")
TOP = ("backend", "explain", "fold")
MAY_IMPORT = {
    "base": {"base"},
    "modules": {"base", "modules"},
    "ir": {"base", "ir"},
    "passes": {"base", "ir", "passes"},
    "lowering": {"base", "ir", "passes", "lowering"},
    "pipeline": {"base", "ir", "passes", "lowering", "pipeline"},
    "top": {"base", "ir", "passes", "lowering", "pipeline", "top"},
    "facade": {"base", "modules", "ir", "passes", "lowering", "pipeline", "top", "facade"},
}


def layer_of(module: str) -> str:
    """`snn_compile.passes.reroll` -> `passes`. The package's own `__init__` is the facade: it may import everything."""
    parts = module.split(".")
    if len(parts) == 1:
        return "facade"
    if parts[1] in MODULES:
        return "modules"
    if parts[1] in TOP:
        return "top"
    return parts[1] if parts[1] in MAY_IMPORT else "base"


def tree_modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, the linked folders included."""
    found = {}
    for folder, _, files in os.walk(ROOT / PACKAGE, followlinks=True):
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_modules(tree: ast.AST, module: str, is_package: bool, known: Iterable[str]) -> Iterator[tuple[str, int]]:
    """(full name, line) of each import in `tree`; `from m import n` gives `m.n` where that is a module, else `m`."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in known else base), node.lineno


def violations(source: str, module: str, known: Iterable[str], is_package: bool = False) -> list[str]:
    """One line for each import in `source` that points the wrong way."""
    wrong = []
    layer = layer_of(module)
    for name, line in imported_modules(ast.parse(source), module, is_package, known):
        first = name.split(".")[0]
        if first in LINKED:
            wrong.append(f"{module}:{line} imports {name}; the package is {PACKAGE}.{name}")
        elif first == PACKAGE and layer_of(name) not in MAY_IMPORT[layer]:
            wrong.append(f"{module}:{line} ({layer}) imports {name} ({layer_of(name)})")
    return wrong


def test_imports_point_one_way() -> None:
    modules = tree_modules()
    assert {"snn_compile.passes", "snn_compile.lowering", "snn_compile.ir"} <= modules.keys()
    wrong = []
    for module, path in modules.items():
        wrong += violations(path.read_text(encoding="utf-8"), module, modules, path.name == "__init__.py")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", LINKED)
def test_root_folders_are_linked_into_the_package(name: str) -> None:
    link = ROOT / PACKAGE / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    assert (ROOT / name).is_dir() and not (ROOT / name).is_symlink()


KNOWN = {
    "snn_compile",
    "snn_compile.config",
    "snn_compile.errors",
    "snn_compile.ir",
    "snn_compile.ir.loop",
    "snn_compile.neuron",
    "snn_compile.neuron.lif",
    "snn_compile.surrogate",
    "snn_compile.passes",
    "snn_compile.passes.reroll",
    "snn_compile.lowering",
    "snn_compile.lowering.cpp",
    "snn_compile.pipeline",
    "snn_compile.backend",
    "snn_compile.explain",
}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("snn_compile.ir.loop", "import snn_compile.passes.reroll"),
        ("snn_compile.ir.loop", "from ..passes import reroll"),
        ("snn_compile.ir.loop", "from .. import passes"),
        ("snn_compile.ir", "from ..passes import reroll"),  # a package: one dot less than in its modules
        ("snn_compile.passes.reroll", "from snn_compile.lowering.cpp import emit"),
        ("snn_compile.passes.reroll", "from snn_compile import surrogate"),  # nothing is recognised by class
        ("snn_compile.passes.reroll", "from snn_compile import explain"),
        ("snn_compile.passes.reroll", "from snn_compile import options"),  # not a module: the facade
        ("snn_compile.passes.reroll", "from passes import hoist"),
        ("snn_compile.lowering.cpp", "def f():\n    from snn_compile.pipeline import run"),
        ("snn_compile.lowering.cpp", "import lowering.triton"),
        ("snn_compile.pipeline", "if TYPE_CHECKING:\n    from snn_compile.backend import snn"),
        ("snn_compile.neuron.lif", "from snn_compile.ir import loop"),
        ("snn_compile.surrogate", "import snn_compile"),
        ("snn_compile.config", "from snn_compile.ir.loop import Loop"),
        ("snn_compile.backend", "from snn_compile.neuron.lif import LIF"),
    ],
)
def test_checker_finds_a_wrong_import(module: str, source: str) -> None:
    assert len(violations(source, module, KNOWN, is_package=module == "snn_compile.ir")) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("snn_compile.ir.loop", "import torch\nfrom snn_compile.errors import Reject\nfrom . import node"),
        ("snn_compile.passes.reroll", "from snn_compile.ir.loop import Loop\nfrom snn_compile import config"),
        ("snn_compile.lowering.cpp", "from snn_compile.passes import reroll\nfrom snn_compile.ir import loop"),
        ("snn_compile.pipeline", "from snn_compile.passes.reroll import reroll\nimport snn_compile.lowering.cpp"),
        ("snn_compile.backend", "from snn_compile import pipeline, explain"),
        ("snn_compile.neuron.lif", "from ..surrogate import Sigmoid\nfrom snn_compile import config"),
    ],
)
def test_checker_lets_a_right_import_pass(module: str, source: str) -> None:
    assert violations(source, module, KNOWN) == []
