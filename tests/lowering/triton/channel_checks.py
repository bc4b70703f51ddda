"""Steps with batch norm of the potential on Triton's channel kernels, against eager: in Triton's interpreter and on a device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snn_compile.config import Config
from snn_compile.lowering import targets
from snn_compile.lowering.triton import channel_kernel, heuristics
from snn_compile.lowering.triton.channel_layout import Place, lay_out
from snn_compile.lowering.triton.heuristics import Tile
from snn_compile.lowering.triton.target import TritonTarget
from snn_compile.lowering.triton.text import KernelText
from snn_compile.pipeline import run_pipeline
from tests.lowering.channel_layers import LAYERS, run

#: ``[T, N, C, *space]``
SHAPES = {
    "odd sizes": (5, 3, 3, 3, 5),
    "more channels": (3, 2, 11, 2, 3),
    "two steps": (2, 2, 3, 2, 2),
    "one sample": (4, 1, 5, 4, 3),
    "one channel": (4, 3, 1, 4, 4),
    "one position": (3, 17, 2, 1, 1),
    "multiples of 16": (3, 16, 2, 4, 4),
    "sequences": (4, 3, 5, 6),
    "volumes": (3, 2, 3, 2, 3, 2),
    "neurons": (5, 9, 11),
}


class InterpretedTarget(TritonTarget):
    def missing(self) -> str | None:
        return None


@contextmanager
def small_tiles(is_tiled: bool) -> Iterator[None]:
    """No channel fits into registers, and a tile has 32 lanes."""
    with pytest.MonkeyPatch.context() as patch:
        if is_tiled:
            patch.setattr(heuristics, "_CHANNEL_LANES", ())
            patch.setattr(heuristics, "_TILE_LANES", ((1, 1), (1, 1)))
            patch.setattr(channel_kernel, "processors", lambda device: 0)  # whatever stands idle
        yield


@contextmanager
def kernels_run(found: list[str]) -> Iterator[None]:
    """Adds the direction of each kernel that runs."""
    kernel_run = channel_kernel.ChannelKernel.run

    def spy(self: Any, *args: Any) -> bool:
        has_run = kernel_run(self, *args)
        if has_run:
            found.append(self.name.rsplit("_", 1)[1])
        return has_run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel_kernel.ChannelKernel, "run", spy)
        yield


def compiled(layer: nn.Module) -> Callable[..., Any]:
    """By the pipeline alone, its graph around the kernels as it is."""
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(True)  # fills what `torch.empty` gives with NaN: nothing may be left unwritten

    def backend(gm, inputs, **_):  # type: ignore[no-untyped-def]
        gm, _ = run_pipeline(gm, Config(strict=True, step_from=2))
        return gm.forward

    return torch.compile(layer, backend=backend, fullgraph=True)


def inputs(shape: Sequence[int], layout: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """The series, the initial state, weights of the loss."""
    x, v, weights = torch.randn(shape) + 0.3, torch.randn(shape[1:]), torch.randn(shape).flatten()
    if layout == "channels last":
        x, v = x.movedim(2, -1).contiguous().movedim(-1, 2), v.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "strided":
        x, v = torch.stack([x, x], -1)[..., 1], torch.stack([v, v], 0)[1]
    elif layout == "unaligned":
        x = torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)
    return x.to(device), v.to(device), weights.to(device)


def check(layer: str, size: str, layout: str = "contiguous", tiled: bool = False, device: str = "cpu", calls: int = 1) -> None:
    """Spikes equal eager's; states and statistics do to rounding, as do gradients. A second call goes on from the first's."""
    torch.manual_seed(0)
    eager = LAYERS[layer](SHAPES[size][2]).to(device)
    ours = copy.deepcopy(eager)
    x, v, weights = inputs(SHAPES[size], layout, device)
    found: list[str] = []
    if device == "cpu":
        targets._target = lambda kind: InterpretedTarget()  # type: ignore[assignment]  # (the process is for this)
    with small_tiles(tiled), kernels_run(found):
        run_ours = compiled(ours)
        for _ in range(calls):
            expected, expected_gradients = run(eager, x, v, weights)
            results, gradients = run(run_ours, x, v, weights)
    assert found == ["forward", "backward", "backward"] * calls
    assert torch.equal(results[0] > 0.5, expected[0] > 0.5)
    for a, b in zip(expected, results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    for a, b in zip(eager.buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    for a, b in zip(expected_gradients, gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * a.abs().max().item())


def check_statistics(shape: Sequence[int], layout: str, device: str) -> None:
    """Of so many potentials some may lie so close to the threshold that rounding decides about their spikes."""
    torch.manual_seed(0)
    eager = LAYERS["hard reset"](shape[2]).to(device)
    ours = copy.deepcopy(eager)
    found: list[str] = []
    x, v, weights = inputs(shape, layout, device)
    with kernels_run(found):
        expected, expected_gradients = run(eager, x, v, weights)
        results, gradients = run(compiled(ours), x, v, weights)
    assert found == ["forward", "backward", "backward"]
    assert (results[0] != expected[0]).float().mean() < 1e-4
    torch.testing.assert_close(ours.norm.running_mean, eager.norm.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.norm.running_var, eager.norm.running_var, rtol=1e-4, atol=1e-5)
    for a, b in zip(expected_gradients, gradients, strict=True):
        assert ((b - a).norm() / a.norm()).item() < 1e-2


def kernels(layer: str, shape: Sequence[int], layout: str = "contiguous") -> dict[str, tuple[KernelText, Tile, int]]:
    """Text, tile and channels of a program for each direction; nothing is computed."""
    found = {}

    def note(self: Any, places: Sequence[Place], tensors: Sequence[Tensor], steps: int) -> bool:
        key = lay_out(places, self.shape).key
        tile = heuristics.channel_tile(self.count, key.channels)
        found[self.name.rsplit("_", 1)[1]] = self.text(key, tile), tile, key.channels
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel_kernel.ChannelKernel, "run", note)
        patch.setattr(targets, "_target", lambda kind: InterpretedTarget())
        x, v, _ = inputs(shape, layout, "cpu")
        y, last = compiled(LAYERS[layer](shape[2]))(x.requires_grad_(), v.requires_grad_())
        torch.autograd.backward([y, last], [torch.ones_like(y), torch.ones_like(last)])
    return found
