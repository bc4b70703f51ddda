"""A convolution whose kernel covers its whole input is a product of matrices, one a group.

    conv1d(s [B, G*I, K], w [G*O, I, K], b, groups=G)        (no padding: the result has one position)

    ->  bmm(s as [G, B, I*K], w as [G, I*K, O]) as [B, G*O, 1] + b

Inter-layer connections write their block-diagonal map this way. On CPU the convolution of a step costs oneDNN up to ten
milliseconds, its product some tens of microseconds. The sum over a row is the same, in the order of the BLAS library: the
values agree to rounding, as those of a layer that is batched over time do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional

from snn_compile.ir.values import example
from snn_compile.passes.autocast_regions import regions
from snn_compile.passes.emit import emit_function

#: ``conv(input, weight, bias, stride, padding, dilation, groups)``
CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
PARAMETERS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def replace_convolutions_at_one_position(gm: fx.GraphModule) -> int:
    """Rewrite `gm` (torch-level, with examples of known sizes) in place; gives the number of convolutions replaced."""
    count = 0
    for node in list(gm.graph.nodes):
        if not is_at_one_position(node):
            continue
        given = _given(node)
        sizes = tuple(example(given["input"]).shape), tuple(example(given["weight"]).shape)
        operands = given["input"], given["weight"], given.get("bias")
        with gm.graph.inserting_before(node):
            numbers = {"sizes": sizes, "groups": given.get("groups", 1)}
            new = emit_function(gm.graph, _product, operands, numbers, regions(node))
        new.meta = {**node.meta, "example_value": new.meta["example_value"]}
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        count += 1
    if count:
        gm.recompile()
    return count


def _given(node: fx.Node) -> dict[str, Any]:
    return dict(zip(PARAMETERS, node.args, strict=False)) | dict(node.kwargs)


def is_at_one_position(node: fx.Node) -> bool:
    """A convolution on CPU whose kernel covers its whole input, of known sizes."""
    if node.target not in CONVOLUTIONS:
        return False
    given = _given(node)
    x, weight = example(given["input"]), example(given["weight"])
    padding, dilation = given.get("padding", 0), given.get("dilation", 1)
    return (
        x.device.type == "cpu"
        and all(isinstance(n, int) for n in (*x.shape, *weight.shape))
        and x.dim() == weight.dim()
        and x.shape[2:] == weight.shape[2:]
        and (padding == "valid" or _all_are(0, padding))
        and _all_are(1, dilation)
    )


def _all_are(value: int, numbers: object) -> bool:
    return all(n == value for n in (numbers if isinstance(numbers, (tuple, list)) else (numbers,)))


def _product(x: Any, weight: Any, bias: Any, sizes: tuple[tuple[int, ...], ...], groups: int) -> Any:
    """``[B, G*I, *K], [G*O, I, *K] -> [B, G*O, 1, ...]``, of proxies."""
    (batch, *_), (channels, *kernel) = sizes
    result = (batch, channels, *(1,) * (len(kernel) - 1))
    if groups == 1:
        return functional.linear(x.reshape(batch, -1), weight.reshape(channels, -1), bias).reshape(result)
    of_x = x.reshape(batch, groups, -1).transpose(0, 1)
    of_weight = weight.reshape(groups, channels // groups, -1).transpose(1, 2)
    y = torch.bmm(of_x, of_weight).transpose(0, 1).reshape(batch, channels)
    return (y if bias is None else y + bias).reshape(result)
