"""Spiking neurons as plain loops: charge, fire, reset. docs/library.md has a table of them."""

from snn_compile.neuron.base import BaseNode
from snn_compile.neuron.gated_lif import GatedLIFNode
from snn_compile.neuron.integrate_and_fire import IFNode, SimpleIFNode
from snn_compile.neuron.inter_layer_connection import ILCBaseNode, ILCCUBALIFNode, ILCIFNode, ILCLIFNode
from snn_compile.neuron.lif import CUBALIFNode, LIFNode, ParametricLIFNode, SimpleLIFNode
from snn_compile.neuron.lif_variants import ALIFNode, KLIFNode, LIAFNode
from snn_compile.neuron.mpbn import MPBNBaseNode, MPBNLIFNode
from snn_compile.neuron.non_spiking import NonSpikingBaseNode, NonSpikingIFNode, NonSpikingLIFNode
from snn_compile.neuron.nonlinear import EIFNode, IzhikevichNode, QIFNode
from snn_compile.neuron.parallel import PSN, MaskedPSN, SlidingPSN
from snn_compile.neuron.stateful import StatefulModule

__all__ = [
    "PSN",
    "ALIFNode",
    "BaseNode",
    "CUBALIFNode",
    "EIFNode",
    "GatedLIFNode",
    "IFNode",
    "ILCBaseNode",
    "ILCCUBALIFNode",
    "ILCIFNode",
    "ILCLIFNode",
    "IzhikevichNode",
    "KLIFNode",
    "LIAFNode",
    "LIFNode",
    "MPBNBaseNode",
    "MPBNLIFNode",
    "MaskedPSN",
    "NonSpikingBaseNode",
    "NonSpikingIFNode",
    "NonSpikingLIFNode",
    "ParametricLIFNode",
    "QIFNode",
    "SimpleIFNode",
    "SimpleLIFNode",
    "SlidingPSN",
    "StatefulModule",
]
