"""The recurrent cells of PyTorch (`nn.LSTMCell`, `nn.GRUCell`, `nn.RNNCell`) as the plain ops that they compute on CPU.

A cell is one opaque call in Dynamo's graph: the part of it that only reads the input (``x @ w_ih.T``) cannot leave the
recurrence, and its gates cannot become a kernel. The order of the operations is ATen's, so the values are equal bit for bit;
on CUDA ATen runs a fused kernel of its own, and the calls are left alone. Source: aten/src/ATen/native/RNN.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from snn_compile.decompositions import register_decomposition

Bias = Tensor | None


@register_decomposition("aten::lstm_cell")
def lstm_cell(  # type: ignore[no-untyped-def]
    x: Tensor, state, w_ih: Tensor, w_hh: Tensor, b_ih: Bias = None, b_hh: Bias = None
) -> tuple[Tensor, Tensor]:
    """``i, f, g, o = x W_ih + h W_hh;  c' = sigmoid(f)*c + sigmoid(i)*tanh(g);  h' = sigmoid(o)*tanh(c')``"""
    if x.device.type != "cpu":
        return NotImplemented
    h, c = state
    i, f, g, o = (F.linear(h, w_hh, b_hh) + F.linear(x, w_ih, b_ih)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


@register_decomposition("aten::gru_cell")
def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Bias = None, b_hh: Bias = None) -> Tensor:
    """``r, z, n = x W_ih;  n = tanh(n + sigmoid(r)*(h W_hn));  h' = (h - n)*sigmoid(z) + n``"""
    if x.device.type != "cpu":
        return NotImplemented
    of_x, of_h = F.linear(x, w_ih, b_ih).chunk(3, 1), F.linear(h, w_hh, b_hh).chunk(3, 1)
    reset, update = torch.sigmoid(of_h[0] + of_x[0]), torch.sigmoid(of_h[1] + of_x[1])
    new = torch.tanh(of_x[2] + of_h[2] * reset)
    return (h - new) * update + new


@register_decomposition("aten::rnn_tanh_cell")
def rnn_tanh_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Bias = None, b_hh: Bias = None) -> Tensor:
    """``h' = tanh(x W_ih + h W_hh)``"""
    return torch.tanh(F.linear(h, w_hh, b_hh) + F.linear(x, w_ih, b_ih))


@register_decomposition("aten::rnn_relu_cell")
def rnn_relu_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Bias = None, b_hh: Bias = None) -> Tensor:
    """``h' = relu(x W_ih + h W_hh)``"""
    return torch.relu(F.linear(h, w_hh, b_hh) + F.linear(x, w_ih, b_ih))
