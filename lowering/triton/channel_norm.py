"""Batch norm along the channels of a program, and its backward, as text: sums, statistics, what is computed from them.

In one step, for ``h`` of `size` values a channel::

    mean = sum(h) / size;  invstd = 1 / sqrt(sum((h - mean)**2) / size + eps);  y = weight * (h - mean) * invstd + bias
    grad_h = (g - sum(g)/size - (h - mean) * sum(g * (h - mean))/size * invstd**2) * invstd * weight

as ATen's own kernels (Normalization.cuh) compute them. Over tiles, every lane of the tile has a mean and a sum of squares of its
own, after Welford; they are put together after the last tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from snn_compile.ir.stepped import Call, Slot
from snn_compile.lowering.channel_program import Unsupported, summed
from snn_compile.lowering.triton.channel_tensors import TILE
from snn_compile.lowering.triton.names import Names
from snn_compile.lowering.triton.values import Value

OfChannel = Callable[[int], Value]
Lines = Callable[..., list[str]]


@dataclass(frozen=True)
class Reduction:
    """Lines before the tiles, for each tile (with the slots of the whole values that they read), and after."""

    start: list[str] = field(default_factory=list)
    each: list[tuple[tuple[int, ...], Lines]] = field(default_factory=list)
    end: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Norm:
    reduction: Reduction
    #: the first result: the slots it is computed from, and its text
    whole: tuple[tuple[int, ...], Callable[..., str]]
    #: the names of the others
    of_channel: tuple[str, str]


def norm_forward(call: Call, of_channel: OfChannel, names: Names, tiled: bool) -> Norm:
    """``native_batch_norm(h, weight, bias) -> y, mean, invstd``"""
    h, weight, bias, running_mean, running_var, training, _, eps = call.args
    if training is not True or running_mean is not None or running_var is not None or not isinstance(h, Slot):
        raise Unsupported
    mean, variance, invstd = (names.unique(n) for n in ("mean", "variance", "invstd"))
    inverse = f"{invstd} = tl.div_rn(1.0, tl.sqrt_rn({variance} + {eps!r}))"
    if tiled:
        reduction = _welford(h.index, mean, variance, inverse, names)
    else:
        reduction = _two_passes(h.index, mean, variance, inverse, names)
    gamma = f"{of_channel(weight.index).text} * " if isinstance(weight, Slot) else ""
    beta = of_channel(bias.index).text if isinstance(bias, Slot) else ""

    def normalised(value: str) -> str:
        centered = f"{gamma}({value} - {mean})" if gamma else f"({value} - {mean})"
        return f"tl.fma({centered}, {invstd}, {beta})" if beta else f"{centered} * {invstd}"

    return Norm(reduction, ((h.index,), normalised), (mean, invstd))


def _two_passes(h: int, mean: str, variance: str, inverse: str, names: Names) -> Reduction:
    distance = names.unique("distance")

    def lines(value: str) -> list[str]:
        return [
            f"{mean} = tl.div_rn({_total(_inside(value))}, size)",
            f"{distance} = {_inside(f'{value} - {mean}')}",
            f"{variance} = tl.div_rn({_total(f'{distance} * {distance}')}, size)",
            inverse,
        ]

    return Reduction(each=[((h,), lines)])


def _welford(h: int, mean: str, variance: str, inverse: str, names: Names) -> Reduction:
    of_lane, squares, distance, apart = (names.unique(n) for n in ("mean_of_lane", "squares", "distance", "apart"))

    def lines(value: str) -> list[str]:
        return [
            f"{distance} = {value} - {of_lane}",
            f"{of_lane} += {_inside(f'{distance} * (1.0 / (start // BLOCK + 1))')}",
            f"{squares} += {_inside(f'{distance} * ({value} - {of_lane})')}",
        ]

    end = [
        "seen = ((count - offset + BLOCK - 1) // BLOCK).to(tl.float32)",
        f"{mean} = tl.div_rn({_total(f'{of_lane} * seen')}, size)",
        f"{apart} = {of_lane} - {mean}",
        f"{variance} = tl.div_rn({_total(f'{squares} + {apart} * {apart} * seen')}, size)",
        inverse,
    ]
    return Reduction([_zeros(of_lane), _zeros(squares)], [((h,), lines)], end)


def norm_backward(call: Call, of_channel: OfChannel, names: Names, tiled: bool) -> Norm:
    """``native_batch_norm_backward(g, h, weight, mean, invstd) -> grad_h, grad_weight, grad_bias``"""
    _, _, weight, running_mean, running_var, mean, invstd, training, *_ = call.args
    slots = summed(call)
    if training is not True or running_mean is not None or running_var is not None or len(slots) != 2:
        raise Unsupported
    if not isinstance(mean, Slot) or not isinstance(invstd, Slot):
        raise Unsupported
    m, inv = of_channel(mean.index).text, of_channel(invstd.index).text
    total, product, center, slope, factor = (names.unique(n) for n in ("total", "product", "center", "slope", "factor"))
    grad_weight = names.unique("grad_weight")
    of_lane = {name: names.unique(f"{name}_of_lane") for name in (total, product)} if tiled else {}
    end = [
        f"{center} = tl.div_rn({total}, size)",
        f"{slope} = tl.div_rn({product}, size) * {inv} * {inv}",
        f"{factor} = {inv}{f' * {of_channel(weight.index).text}' if isinstance(weight, Slot) else ''}",
        f"{grad_weight} = {product} * {inv}",
    ]

    def sums(g: str, h: str) -> Sequence[tuple[str, str]]:
        return (total, _inside(g)), (product, _inside(f"{g} * ({h} - {m})"))

    def add_up(g: str, h: str) -> list[str]:
        return [f"{of_lane[name]} += {text}" for name, text in sums(g, h)]

    def at_once(g: str, h: str) -> list[str]:
        return [f"{name} = {_total(text)}" for name, text in sums(g, h)]

    if tiled:
        end = [*(f"{name} = {_total(lanes)}" for name, lanes in of_lane.items()), *end]
        reduction = Reduction([*map(_zeros, of_lane.values())], [(slots, add_up)], end)
    else:
        reduction = Reduction(each=[(slots, at_once)], end=end)
    whole = slots, lambda g, h: f"({g} - {center} - ({h} - {m}) * {slope}) * {factor}"
    return Norm(reduction, whole, (grad_weight, total))


def _inside(value: str) -> str:
    """Lanes outside of the channel hold anything."""
    return f"tl.where(inside, {value}, 0.0)"


def _total(value: str) -> str:
    return f"tl.sum({value}, 0, keep_dims=True)"


def _zeros(name: str) -> str:
    return f"{name} = tl.zeros({TILE}, tl.float32)"
