"""Spike-timing-dependent plasticity (STDP) with one trace for each spike train."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from snn_compile.neuron.stateful import StatefulModule


class STDPLearner(StatefulModule):
    r"""Changes the weights of a Linear from the timing of the spikes before and after it.

    .. math::
        tr_{pre} &\mathrel{+}= s_{pre} - tr_{pre}/\tau_{pre} \\
        tr_{post} &\mathrel{+}= s_{post} - tr_{post}/\tau_{post} \\
        W &\mathrel{+}= lr\left(f_{pre}(W)\; tr_{post} \otimes s_{pre} + f_{post}(W)\; s_{post} \otimes tr_{pre}\right)

    The traces are updated first, then used; the outer products are summed over the batch. The signs are in f_pre and
    f_post: depression for a presynaptic spike is a negative f_pre.

    Args:
        tau_pre, tau_post: time constants of the traces in steps, at least 1.
        f_pre, f_post: functions of the weight matrix, for instance `lambda w: -w` and `lambda w: 1 - w`.

    States: tr_pre [N, in], tr_post [N, out], from 0; `reset()` forgets them.
    Raises: ValueError where a time constant is below 1 or a spike tensor has another shape; TypeError where the module
        is no Linear.
    Paper: Morrison et al., "Phenomenological models of synaptic plasticity based on spike timing", Biological
        Cybernetics 2008.

    Fixed against the original, which computes the traces and never uses them.
    """

    step_modes = ("s",)
    tr_pre: Tensor
    tr_post: Tensor

    def __init__(
        self,
        tau_pre: float,
        tau_post: float,
        f_pre: Callable[[Tensor], Tensor],
        f_post: Callable[[Tensor], Tensor],
    ):
        for name, tau in (("tau_pre", tau_pre), ("tau_post", tau_post)):
            if not tau >= 1:
                raise ValueError(f"{name} must be at least 1, but is {tau!r}")
        super().__init__()
        self.tau_pre = tau_pre
        self.tau_post = tau_post
        self.f_pre = f_pre
        self.f_post = f_post
        self.register_state("tr_pre", 0.0)
        self.register_state("tr_post", 0.0)

    @torch.no_grad()
    def stdp(self, s_pre: Tensor, s_post: Tensor, linear: nn.Linear, lr: float) -> None:
        """Change `linear.weight` in place for one step of spikes, s_pre [N, in] or [in], s_post [N, out] or [out]."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, but is a {type(linear).__name__}")
        s_pre, s_post = torch.atleast_2d(s_pre), torch.atleast_2d(s_post)
        self._check(s_pre, s_post, linear)
        tr_pre, tr_post = self.update_traces(s_pre, s_post)
        depression = self.f_pre(linear.weight) * (tr_post.T @ s_pre)
        potentiation = self.f_post(linear.weight) * (s_post.T @ tr_pre)
        linear.weight += lr * (depression + potentiation)

    def forward(self, s_pre: Tensor, s_post: Tensor, linear: nn.Linear, lr: float) -> None:  # type: ignore[override]
        self.stdp(s_pre, s_post, linear, lr)

    def update_traces(self, s_pre: Tensor, s_post: Tensor) -> tuple[Tensor, Tensor]:
        """The traces after this step's spikes, which are carried on."""
        self.tr_pre = self.tr_pre - self.tr_pre / self.tau_pre + s_pre
        self.tr_post = self.tr_post - self.tr_post / self.tau_post + s_post
        return self.tr_pre, self.tr_post

    def _check(self, s_pre: Tensor, s_post: Tensor, linear: nn.Linear) -> None:
        out_features, in_features = linear.weight.shape
        if s_pre.shape != (len(s_pre), in_features) or s_post.shape != (len(s_pre), out_features):
            raise ValueError(
                f"s_pre and s_post must be [N, {in_features}] and [N, {out_features}], but are {list(s_pre.shape)} and "
                f"{list(s_post.shape)}"
            )
        if isinstance(self.tr_pre, Tensor) and self.tr_pre.shape != s_pre.shape:
            raise ValueError(
                f"STDPLearner: the traces are for s_pre {list(self.tr_pre.shape)}, but s_pre is {list(s_pre.shape)}; "
                "call functional.reset_net(net) before a new sequence"
            )
