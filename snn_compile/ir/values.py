"""What the passes know of a node's value: its example, its shape hints, its storage."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx


def example(node: object) -> Any:
    """The fake value Dynamo (or a pass) recorded for the node; a Python number stands for itself."""
    if isinstance(node, fx.Node):
        return node.meta.get("example_value", node.meta.get("val"))
    return node


def wanting_grad(value: Any, others: Iterable[object]) -> Any:
    """An example that stands for `value` and `others`: one of them wants a gradient, so it does.

    An iteration may start from a constant and go on with a value that depends on a parameter; an example that said no would
    cost a gradient.
    """
    if not isinstance(value, torch.Tensor) or value.requires_grad or not value.dtype.is_floating_point:
        return value
    if not any(isinstance(o, torch.Tensor) and o.requires_grad for o in others):
        return value
    return value.detach().requires_grad_()


def hint(size: int | torch.SymInt) -> int:
    """A concrete size for a possibly symbolic one, without adding a guard."""
    return size if isinstance(size, int) else int(size.node.hint)


def known_int(value: object) -> int | None:
    """A number, or a symbolic one that guards have pinned down; None for all else."""
    if isinstance(value, int):
        return value
    return value.node.maybe_as_int() if isinstance(value, torch.SymInt) else None


def size_key(size: int | torch.SymInt) -> object:
    """A size to be compared and hashed without adding a guard: symbolic ones are the same where they are one expression."""
    return size if isinstance(size, int) else size.node.expr


def count_text(size: int | torch.SymInt) -> str:
    """A number of steps, for reports: ``T`` where it is known at run time only."""
    known = known_int(size)
    return "T" if known is None else str(known)


def known_layout(value: torch.Tensor) -> tuple[list[int], list[int]] | None:
    """Sizes and strides, where all of them are known."""
    sizes, strides = ([known_int(s) for s in numbers] for numbers in (value.shape, value.stride()))
    return None if None in (*sizes, *strides) else (sizes, strides)  # type: ignore[return-value]


def shape_hint(value: torch.Tensor) -> tuple[int, ...]:
    return tuple(hint(s) for s in value.shape)


def shape_key(value: torch.Tensor) -> tuple[object, ...]:
    """The shape as a hashable value, which a symbolic size is not."""
    return tuple(map(size_key, value.shape))


def storage_key(node: fx.Node) -> int | None:
    """Nodes with the same key alias each other (fake tensors share storages as real ones would)."""
    value = example(node)
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def flat_nodes(args: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(args, lambda n: found.append(n))
    return found


def is_getitem(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is operator.getitem


def user_location(node: fx.Node) -> str:
    """``file:line`` of the innermost frame of the user's code, for reports only."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    if not frames:
        return ""
    parts = frames[-1].split('"')
    line = frames[-1].rsplit("line ", 1)[-1].split(",")[0] if "line " in frames[-1] else ""
    return f"{parts[1]}:{line}" if len(parts) > 1 else ""


def user_line(node: fx.Node) -> str:
    """The source line of the user's code that made the node, for reports only."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith("File ")]
    return lines[frames[-1] + 1] if frames and frames[-1] + 1 < len(lines) else ""


def base_name(name: str) -> str:
    """``v_12`` -> ``v``: Dynamo numbers the values of one Python variable."""
    return re.sub(r"(_\d+)+$", "", name) or name


def value_name(node: fx.Node) -> str:
    """The user's name for a value. Dynamo leaves what an `autograd.Function` gives back unnamed: a spike, then."""
    if is_getitem(node) and node.name.startswith("getitem"):
        source = node.args[0]
        if isinstance(source, fx.Node) and source.target is torch.ops.higher_order.autograd_function_apply:
            return "s"
    return base_name(node.name)
