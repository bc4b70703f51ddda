"""Spiking neurons as plain loops: charge, fire, reset."""

from snn_compile.neuron.base import BaseNode
from snn_compile.neuron.integrate_and_fire import IFNode, SimpleIFNode
from snn_compile.neuron.lif import CUBALIFNode, LIFNode, ParametricLIFNode, SimpleLIFNode
from snn_compile.neuron.stateful import StatefulModule

__all__ = [
    "BaseNode",
    "CUBALIFNode",
    "IFNode",
    "LIFNode",
    "ParametricLIFNode",
    "SimpleIFNode",
    "SimpleLIFNode",
    "StatefulModule",
]
