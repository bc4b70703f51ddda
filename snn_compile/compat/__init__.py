"""What other libraries hide from a compiler: loops behind opaque ops, and modules that end Dynamo's graph; one file a library.

`prepare` is the second part, and opt-in: it changes how modules of snnTorch, Norse, sinabs and your own do what they do, on the
instances of one model, so that Dynamo can follow them. Values, gradients and `state_dict` stay.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.autograd import Function

__all__ = ["prepare"]

Model = TypeVar("Model", bound=nn.Module)

log = logging.getLogger("snn_compile")

#: library -> the versions that its shim was tested with
LIBRARIES = {"snntorch": ("1.0.0",), "norse": ("1.1.0",), "sinabs": ("3.1.3",)}


def prepare(model: Model) -> Model:
    """Let Dynamo follow the neurons of other libraries in `model`, in place; gives `model` back.

        model = torch.compile(snn_compile.compat.prepare(model), backend="snn")

    ======== ============================================================================================================
    snnTorch ``reset_delay=False`` branches on a tensor: on a number then. The surrogates are allowed in Dynamo's graph as
             one call each (process-wide), which halves the time of the trace. ``mem == None``, which Dynamo of torch 2.11
             cannot follow, is ``mem is None`` there (process-wide).
    Norse    a cell that makes its own initial state writes `requires_grad` on it: the same state without the write. Sizes of
             recurrent layers are tensors of one number: numbers then.
    sinabs   a spike function given as a class, whose attributes Dynamo cannot read: an object that calls it.
    any      ``self.spike = Spike()``, an instance of an `autograd.Function`, which Dynamo cannot call: its class.
    ======== ============================================================================================================

    Where anything was changed, compiled code is forgotten (`torch._dynamo.reset`), and it is logged, at level INFO of
    ``logging.getLogger("snn_compile")``. All else of a module of none of these libraries is left alone, and so is one that does
    not look like the versions in `LIBRARIES`.
    """
    changes = [(type(m).__name__, name, change) for name, m in model.named_modules() for change in _changes(m)]
    for change in changes:
        log.info("compat: %s '%s': %s", *change)
    if changes:
        torch._dynamo.reset()  # (code in which a graph broke is not looked at again)
    return model


def _changes(module: nn.Module) -> Iterator[str]:
    """Change a module, and say what was."""
    for attribute in _call_functions_by_class(module):
        yield f"{attribute} is the class in place of an instance"
    library = type(module).__module__.split(".")[0]
    if library in LIBRARIES:
        shim = importlib.import_module(f"snn_compile.compat.{library}")
        if change := shim.prepare(module):
            yield change


def _call_functions_by_class(module: nn.Module) -> list[str]:
    """``self.spike = Spike()  ->  self.spike = Spike``: `apply` is the class's own, and an instance has nothing to add to it."""
    found = [name for name, value in vars(module).items() if isinstance(value, Function) and not vars(value)]
    for name in found:
        setattr(module, name, type(getattr(module, name)))
    return found
