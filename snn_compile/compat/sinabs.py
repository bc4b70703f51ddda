"""sinabs: spike functions as objects. Tested with 3.1.3; https://github.com/synsense/sinabs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def prepare(module: nn.Module) -> str:
    """``spike_fn=MultiSpike`` (a class, whose attributes Dynamo cannot read) -> an object that calls it."""
    function = getattr(module, "spike_fn", None)
    if not (inspect.isclass(function) and issubclass(function, torch.autograd.Function)):
        return ""
    if not hasattr(function, "required_states"):
        return ""
    setattr(module, "spike_fn", SpikeFunction(function))  # noqa: B010 (it is no submodule)
    return f"{function.__name__} is called through an object"


class SpikeFunction:
    """What a layer of sinabs asks of a spike function: `apply`, and the names of the states that it reads."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function, self.required_states = function, list(function.required_states)  # type: ignore[attr-defined]

    def apply(self, *args: Any) -> Tensor:
        return self.function.apply(*args)  # type: ignore[no-any-return]
