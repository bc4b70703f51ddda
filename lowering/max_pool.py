"""ATen's max pooling as it is: one op forward, one backward, whose gradient follows the indices that the forward saved.

    snn_compile::max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode) -> (y, indices)

On CPU, Inductor's own backward asks for every element of ``x`` which windows it is the maximum of, and does not vectorise that on
channels-last values: 19 ms where ATen takes 4 (``[256, 16, 32, 32]``, fp32, windows of 2x2, one thread, torch 2.13).
"""

from __future__ import annotations

from typing import Any

import torch

from snn_compile.lowering.registration import define_differentiable, define_once, define_op, overload

_ARGUMENTS = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"


def max_pool2d(
    x: Any,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """`torch.nn.functional.max_pool2d`, without indices. Run on proxies, too."""
    pairs = [v if isinstance(v, (tuple, list)) else (v, v) for v in (kernel_size, stride or kernel_size, padding, dilation)]
    return _op()(x, *map(list, pairs), ceil_mode)[0]


def _op() -> torch._ops.OpOverload:
    return define_once("max_pool2d", _define)


def _define() -> None:
    # (what runs on tensors runs on fake ones, too)
    define_op(
        "max_pool2d_backward",
        f"(Tensor grad_y, Tensor x, {_ARGUMENTS}, Tensor indices) -> Tensor",
        torch.ops.aten.max_pool2d_with_indices_backward.default,
        torch.ops.aten.max_pool2d_with_indices_backward.default,
    )

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, *ctx.arguments = inputs
        ctx.save_for_backward(x, output[1])
        ctx.mark_non_differentiable(output[1])

    def backward(ctx, grad_y, _):  # type: ignore[no-untyped-def]
        x, indices = ctx.saved_tensors
        # (ATen goes by the gradient's layout, and copies all others)
        grad_y = grad_y.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))
        grad_x = overload("max_pool2d_backward")(grad_y, x, *ctx.arguments, indices)
        return (grad_x, *(None,) * len(ctx.arguments))

    run = torch.ops.aten.max_pool2d_with_indices.default
    schema = f"(Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor)"
    define_differentiable("max_pool2d", schema, run, run, (setup_context, backward))
