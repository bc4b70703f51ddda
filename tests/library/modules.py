"""Every stateful module and every multi-step neuron of the library, with an input that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snn_compile import layer, neuron


@dataclass(frozen=True)
class Size:
    steps: int
    batch: int
    channels: int


@dataclass(frozen=True)
class Module:
    """A module under test: `make(step_mode)` builds it, `shape` is the shape of one step's input."""

    name: str
    make: Callable[[str], nn.Module]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    def inputs(self, steps: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(steps, *self.shape, generator=generator, dtype=dtype) + 0.5


def _neurons(size: Size) -> list[Module]:
    """The neurons with the usual arguments, with hard and with soft reset."""
    C, flat, image = size.channels, (size.batch, size.channels), (size.batch, size.channels, 2, 2)

    def node(cls: type, label: str = "", **kwargs) -> Module:  # type: ignore[no-untyped-def]
        return Module(f"{cls.__name__}{label}", lambda mode: cls(step_mode=mode, **kwargs), flat)

    nodes = [
        neuron.IFNode,
        neuron.SimpleIFNode,
        neuron.LIFNode,
        neuron.ParametricLIFNode,
        neuron.CUBALIFNode,
        neuron.KLIFNode,
        neuron.ALIFNode,
        neuron.QIFNode,
        neuron.EIFNode,
        neuron.IzhikevichNode,
    ]
    resets = {"": {}, "-soft": {"v_reset": None}, "-detach": {"v_reset": -0.1, "detach_reset": True}}
    found = [node(cls, label, **kwargs) for cls in nodes for label, kwargs in resets.items()]
    found += [node(neuron.SimpleLIFNode, f"-decay-input-{decay}", tau=2.0, decay_input=decay) for decay in (True, False)]
    found += [node(neuron.LIFNode, "-decay-input-False", decay_input=False, v_reset=-0.1)]
    found += [node(neuron.KLIFNode, "-scale-reset", scale_reset=True)]
    for related in (True, False):
        found += [node(neuron.LIAFNode, "-threshold" if related else "", act=torch.tanh, threshold_related=related)]
    found += [node(neuron.MPBNLIFNode, "-2d", out_features=C)]
    found += [node(neuron.MPBNLIFNode, "-learnable", out_features=C, learnable_vth=True)]
    found += [Module("MPBNLIFNode-4d", lambda mode: neuron.MPBNLIFNode(step_mode=mode, out_channels=C), image)]
    found += [Module("MPBNLIFNode-folded", lambda mode: _folded(mode, C), flat)]
    return found


def _folded(mode: str, channels: int) -> nn.Module:
    node = neuron.MPBNLIFNode(step_mode=mode, out_features=channels)
    node.re_parameterize_v_threshold(normalize_residual=True, running_stats=True)
    return node


def _layers(size: Size) -> list[Module]:
    C, flat, image = size.channels, (size.batch, size.channels), (size.batch, size.channels, 2, 2)
    lif = neuron.LIFNode
    return [
        Module("NeuNorm", lambda mode: layer.NeuNorm(C, 2, 2, step_mode=mode), image),
        Module("SynapseFilter", lambda mode: layer.SynapseFilter(step_mode=mode), flat),
        Module("SynapseFilter-learnable", lambda mode: layer.SynapseFilter(learnable=True, tau=2.0, step_mode=mode), flat),
        Module("Dropout", lambda mode: layer.Dropout(step_mode=mode), flat),
        Module("Dropout2d", lambda mode: layer.Dropout2d(step_mode=mode), image),
        Module("DropConnectLinear", lambda mode: layer.DropConnectLinear(C, 5, invariant=True, step_mode=mode), flat),
        Module(
            "ElementWiseRecurrentContainer",
            lambda mode: layer.ElementWiseRecurrentContainer(lif(), torch.add, mode),
            flat,
        ),
        Module(
            "LinearRecurrentContainer",
            lambda mode: layer.LinearRecurrentContainer(nn.Sequential(nn.Linear(C, 5), lif()), C, 5, step_mode=mode),
            flat,
        ),
    ]


def stateful(size: Size) -> list[Module]:
    """Run in both step modes, with states."""
    return _neurons(size) + _layers(size)


def multi_step(size: Size) -> list[Module]:
    """Take sequences only; SlidingPSN and MaskedPSN have a single-step mode, which carries a queue."""
    T, C, flat, image = size.steps, size.channels, (size.batch, size.channels), (size.batch, size.channels, 2, 2)
    return [
        Module("GatedLIFNode", lambda mode: neuron.GatedLIFNode(T), flat),
        Module("GatedLIFNode-channels", lambda mode: neuron.GatedLIFNode(T, C), image),
        Module("NonSpikingIFNode", lambda mode: neuron.NonSpikingIFNode(), flat),
        *(
            Module(f"NonSpikingLIFNode-{decode}", lambda mode, decode=decode: neuron.NonSpikingLIFNode(decode=decode), flat)
            for decode in (None, "max-mem", "max-abs-mem", "mean-mem", "last-mem")
        ),
        Module("ILCIFNode", lambda mode: neuron.ILCIFNode(2, C // 2), flat),
        Module("ILCLIFNode", lambda mode: neuron.ILCLIFNode(2, C // 2, v_reset=None), flat),
        Module("ILCCUBALIFNode", lambda mode: neuron.ILCCUBALIFNode(2, C // 2), flat),
        Module("PSN", lambda mode: neuron.PSN(T), flat),
        Module("MaskedPSN", lambda mode: neuron.MaskedPSN(2, T, 1.0, step_mode="m"), flat),
        Module("SlidingPSN", lambda mode: neuron.SlidingPSN(2, step_mode="m"), flat),
        Module("MultiStepContainer", lambda mode: layer.MultiStepContainer(nn.Linear(C, 5), neuron.LIFNode()), flat),
        Module("SeqToANNContainer", lambda mode: layer.SeqToANNContainer(nn.Linear(C, 5), nn.ReLU()), flat),
        Module("MultiStepDropout", lambda mode: layer.MultiStepDropout(), flat),
        Module("MultiStepDropout2d", lambda mode: layer.MultiStepDropout2d(), image),
    ]


SMALL = Size(4, 3, 6)
T, N, C = SMALL.steps, SMALL.batch, SMALL.channels
STATEFUL, MULTI_STEP = stateful(SMALL), multi_step(SMALL)


def states(module: nn.Module) -> dict[str, Tensor]:
    """Every carried state of a module and of those inside it, by name."""
    found = {}
    for name, child in module.named_modules():
        if isinstance(child, neuron.StatefulModule):
            found |= {f"{name}.{key}": value for key, value in child.__dict__.items() if isinstance(value, Tensor)}
    return found
