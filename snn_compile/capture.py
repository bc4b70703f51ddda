"""Dynamo's graph of a function, taken instead of compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Capture:
    """The one graph of a call: what it was given, what it gave, and what the function made of that."""

    graph: fx.GraphModule
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    result: Any


def capture(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Capture | None:
    """Call `function` under Dynamo, sizes and numbers as they are; None where it computes nothing. Raises on a graph break."""
    found: list[tuple[fx.GraphModule, Sequence[Any], Sequence[Any]]] = []

    def keep(graph: fx.GraphModule, _: object) -> Callable[..., object]:
        def run(*given: object) -> object:
            outputs = graph(*given)
            found.append((graph, given, outputs))
            return outputs

        return run

    result = torch.compile(function, backend=keep, fullgraph=True, dynamic=False)(*args, **kwargs)
    return Capture(*found[0], result) if found else None
