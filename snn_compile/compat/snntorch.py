"""snnTorch: branches on numbers, ``mem is None``, and surrogates as one call each. Tested with 1.0.0;
https://github.com/jeshraghian/snntorch."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from types import FunctionType

import torch
from torch import Tensor, nn

from snn_compile.compat.rewrite import rewritten

#: the buffer that says which reset a neuron does, read as ``if self.reset_mechanism_val == 0`` in every step
RESET = "reset_mechanism_val"


def prepare(module: nn.Module) -> str:
    """``if tensor == 0`` in the neuron's step -> ``if number == 0``."""
    allow_surrogates()
    if torch.__version__ < (2, 13):  # type: ignore[operator]
        compare_with_none_by_identity(type(module))  # type: ignore[arg-type]
    value = module._buffers.get(RESET)
    if not isinstance(value, Tensor) or value.dim():
        return ""
    number = int(value)
    del module._buffers[RESET]
    setattr(module, RESET, number)
    module.register_state_dict_post_hook(_save)
    module.register_load_state_dict_pre_hook(_load)
    return f"'{RESET}' is the number {number}"


def _save(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    state[prefix + RESET] = torch.as_tensor(getattr(module, RESET))


def _load(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    if prefix + RESET in state:
        setattr(module, RESET, int(state.pop(prefix + RESET)))


@functools.cache
def allow_surrogates() -> None:
    """Dynamo puts one call of each surrogate into its graph and does not look inside: half the time of a trace."""
    surrogates = vars(sys.modules["snntorch.surrogate"]).values() if "snntorch.surrogate" in sys.modules else ()
    for cls in surrogates:
        if inspect.isclass(cls) and issubclass(cls, torch.autograd.Function):
            torch.compiler.allow_in_graph(cls)


@functools.cache
def compare_with_none_by_identity(cls: type) -> None:
    """``if not mem == None``, in which Dynamo of torch 2.11 ends its graph -> ``if not mem is None``, in all methods of `cls`."""
    for function in vars(cls).values():
        code = rewritten(function, _ByIdentity()) if isinstance(function, FunctionType) else None
        if code is not None:
            function.__code__ = code


class _ByIdentity(ast.NodeTransformer):
    def visit_Compare(self, node: ast.Compare) -> ast.Compare:
        is_none = isinstance(node.comparators[0], ast.Constant) and node.comparators[0].value is None
        if is_none and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq):
            node.ops = [ast.Is()]
        return node
