"""A function of a library with one thing written differently: its source, changed as a tree, at the place where it stands."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import CodeType, FunctionType


def rewritten(function: FunctionType, change: ast.NodeTransformer) -> CodeType | None:
    """The code of `function` after `change`; None where it is as it was, or cannot be compiled alone (no source, a closure)."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return None
    before, old = ast.dump(tree), function.__code__
    tree = change.visit(tree)
    if old.co_freevars or ast.dump(tree) == before:
        return None
    module = compile(ast.increment_lineno(ast.fix_missing_locations(tree), old.co_firstlineno - 1), old.co_filename, "exec")
    return next(c for c in module.co_consts if isinstance(c, CodeType) and c.co_name == old.co_name)
