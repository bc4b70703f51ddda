"""Layers of spiking networks beside the neurons. docs/library.md has a table of them."""

from snn_compile.layer.container import (
    ElementWiseRecurrentContainer,
    LinearRecurrentContainer,
    MultiStepContainer,
    SeqToANNContainer,
)
from snn_compile.layer.dropout import DropConnectLinear, Dropout, Dropout2d, MultiStepDropout, MultiStepDropout2d
from snn_compile.layer.linear_maps import AXAT, DCT, ChannelsPool, ConvBatchNorm2d, PrintShapeModule
from snn_compile.layer.stdp import STDPLearner
from snn_compile.layer.synapse import NeuNorm, SynapseFilter

__all__ = [
    "AXAT",
    "DCT",
    "ChannelsPool",
    "ConvBatchNorm2d",
    "DropConnectLinear",
    "Dropout",
    "Dropout2d",
    "ElementWiseRecurrentContainer",
    "LinearRecurrentContainer",
    "MultiStepContainer",
    "MultiStepDropout",
    "MultiStepDropout2d",
    "NeuNorm",
    "PrintShapeModule",
    "STDPLearner",
    "SeqToANNContainer",
    "SynapseFilter",
]
