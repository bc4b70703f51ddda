"""What other libraries hide from a compiler: loops behind opaque ops, and modules that end Dynamo's graph; one file a library.

`prepare` is the second part, and opt-in: it changes how modules of snnTorch, Norse and sinabs do what they do, on the instances
of one model, so that Dynamo can follow them. Values, gradients and `state_dict` stay.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TypeVar

from torch import nn

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
             one call each (process-wide), which halves the time of the trace.
    Norse    a cell that makes its own initial state writes `requires_grad` on it: the same state without the write.
    sinabs   a spike function given as a class, whose attributes Dynamo cannot read: an object that calls it.
    ======== ============================================================================================================

    What was changed is logged (``logging.getLogger("snn_compile")``, level INFO). A module of none of these libraries is left
    alone, and so is one that does not look like the versions in `LIBRARIES`.
    """
    for library in LIBRARIES:
        if library in sys.modules:  # no instance of a library that was never imported
            shim = importlib.import_module(f"snn_compile.compat.{library}")
            for name, module in model.named_modules():
                if type(module).__module__.split(".")[0] == library and (change := shim.prepare(module)):
                    log.info("compat: %s '%s': %s", type(module).__name__, name, change)
    return model
