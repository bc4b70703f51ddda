"""Norse: initial states without a write of `requires_grad`, sizes that are numbers. Tested with 1.1.0;
https://github.com/norse/norse."""

from __future__ import annotations

import ast
from types import FunctionType, MethodType

import torch
from torch import nn

from snn_compile.compat.rewrite import rewritten

#: where a cell makes its initial state
METHODS = ("state_fallback", "forward")


def prepare(module: nn.Module) -> str:
    """``state = State(…); state.v.requires_grad = True`` (a graph break) -> the same state without the write.

    The leaf that Norse marks is made inside of the call and given to nobody, so its gradient cannot be read. Where the state is
    somebody's (`IzhikevichCell` hands out its parameters' own), the write stays.

    ``self.hidden_size = torch.as_tensor(12)``, read by ``torch.zeros(batch, self.hidden_size)`` (which AOTAutograd cannot trace)
    -> ``self.hidden_size = 12``.
    """
    changes = [f"{name} is a number" for name in _sizes_to_numbers(module)]
    changed = False
    for name in METHODS:
        method = getattr(module, name, None)
        if not isinstance(method, MethodType) or not isinstance(method.__func__, FunctionType):
            continue
        old = method.__func__
        code = rewritten(old, _WithoutMarks())
        if code is not None:
            new = FunctionType(code, old.__globals__, old.__name__, old.__defaults__)
            new.__kwdefaults__ = old.__kwdefaults__
            setattr(module, name, MethodType(new, method.__self__))
            changed = True
    if changed:
        changes.append("its initial state is made without a write of `requires_grad`")
    return ", ".join(changes)


def _sizes_to_numbers(module: nn.Module) -> list[str]:
    sizes = {k: v for k, v in vars(module).items() if k.endswith("_size") and isinstance(v, torch.Tensor) and v.dim() == 0}
    for name, value in sizes.items():
        setattr(module, name, int(value))
    return list(sizes)


class _WithoutMarks(ast.NodeTransformer):
    """Of a state that the statements before make: ``requires_grad=True`` in the calls that make it, and writes of it, go.

    It is one that is written, or the function's result.
    """

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in ("body", "orelse"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, _without_marks(statements))
        return node


def _without_marks(statements: list[ast.stmt]) -> list[ast.stmt]:
    kept: list[ast.stmt] = []
    made: dict[str, ast.Call] = {}
    for statement in statements:
        target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
        value = statement.value if isinstance(statement, ast.Assign) else None
        if isinstance(target, ast.Name) and isinstance(value, ast.Call):
            made[target.id] = value
        if isinstance(target, ast.Attribute) and target.attr == "requires_grad" and _owner(target) in made:
            _drop_keyword(made[_owner(target)])
            continue
        if isinstance(statement, ast.Return) and isinstance(statement.value, ast.Name) and statement.value.id in made:
            _drop_keyword(made[statement.value.id])
        kept.append(statement)
    return kept


def _drop_keyword(made: ast.Call) -> None:
    for call in ast.walk(made):
        if isinstance(call, ast.Call):
            call.keywords = [k for k in call.keywords if k.arg != "requires_grad"]


def _owner(target: ast.Attribute) -> str:
    """``state.lif.v.requires_grad`` -> ``state``."""
    node: ast.expr = target
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
