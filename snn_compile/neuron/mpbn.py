r"""Membrane potential batch normalisation (MPBN): the potential is normalised after charging, before the neuron fires.

    charge     h = BN(charge(x, v))
    fire       s = H(h - vth)
    reset      as `BaseNode`; the normalised potential is the one carried on

`re_parameterize_v_threshold` folds the trained normalisation into the threshold, per channel:

    BN(h) >= vth    <=>    h >= vth~ = (vth - beta)*sqrt(sigma2 + eps)/gamma + mu           where gamma > 0
                           h <= vth~                                                        where gamma < 0
                           beta >= vth, whatever h                                          where gamma == 0

Papers: Guo et al., "Membrane potential batch normalization for spiking neural networks", ICCV 2023 (arXiv 2308.08359);
Zhao et al., "Threshold modulation for online test-time adaptation of spiking neural networks" (arXiv 2505.05375).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from snn_compile.neuron.base import BaseNode
from snn_compile.neuron.checks import check_bool, check_count, check_sequence, check_tau


class MPBNBaseNode(BaseNode):
    r"""A spiking neuron whose potential is batch-normalised before it fires.

    In training, each step is normalised with its own batch statistics and updates the running ones: T updates a call.
    A subclass gives the charge before the normalisation, `pre_charge(x, v)`.

    After `re_parameterize_v_threshold` each step fires against the folded threshold. In training mode (test-time
    adaptation) each step then takes mu and sigma2 anew from its batch, unbiased and detached; gamma and beta stay
    trainable. A 2-D batch of one row has no variance and is skipped.

    Args:
        v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq: see `BaseNode`.
        mpbn: whether to normalise at all.
        out_features: number of channels of a 2-D input [N, C], after a Linear.
        out_channels: number of channels of a 4-D input [N, C, H, W], after a Conv2d. Give one of the two.
        learnable_vth: the threshold of each channel is exp(a), a learnable, instead of v_threshold.
        bn_momentum: momentum of the average of mu and sigma2 in test-time adaptation with running statistics.
        bn_decay_momentum: factor by which that momentum shrinks at each update.
        bn_min_momentum: where it stops.

    Shapes: [N, C] or [N, C, H, W] a step -> the same.
    Raises: ValueError where not exactly one of out_features and out_channels is given, or the input has another rank.

    Fixed against SpikingJelly 2.0.0: the fold is exact for gamma < 0 and gamma == 0, the soft reset subtracts in the
    space in which the potential is carried, and it subtracts the learned threshold where there is one.
    """

    # from the fold on
    v_threshold: float | Tensor  # type: ignore[assignment]
    mu: Tensor
    sigma2: Tensor
    momentum: Tensor
    gamma: Tensor
    beta: Tensor
    eps: float

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: nn.Module | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
        mpbn: bool = True,
        out_features: int | None = None,
        out_channels: int | None = None,
        learnable_vth: bool = False,
        bn_momentum: float = 0.1,
        bn_decay_momentum: float = 0.94,
        bn_min_momentum: float = 0.005,
    ):
        channels = out_features if out_channels is None else out_channels
        if channels is None or (out_features is not None and out_channels is not None):
            raise ValueError(
                f"give exactly one of out_features (2-D input) and out_channels (4-D input), not {out_features!r} and "
                f"{out_channels!r}"
            )
        check_bool("mpbn", mpbn)
        check_bool("learnable_vth", learnable_vth)
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq)
        check_count("out_features" if out_channels is None else "out_channels", channels)
        self.channels = channels
        self.dim = 2 if out_channels is None else 4
        norm = nn.BatchNorm1d if self.dim == 2 else nn.BatchNorm2d
        self.vbn: Any = norm(channels) if mpbn else nn.Identity()
        self.learnable_vth = learnable_vth
        if learnable_vth:
            self.a = nn.Parameter(torch.zeros(channels))
        self.bn_momentum = bn_momentum
        self.bn_decay_momentum = bn_decay_momentum
        self.bn_min_momentum = bn_min_momentum
        self.fold_bn = False
        self.normalize_residual = False
        self.running_stats = False

    def pre_charge(self, x: Tensor, v: Tensor) -> Tensor:
        """The membrane potential after charging, before its normalisation."""
        raise NotImplementedError(f"{type(self).__name__} must give its charge in pre_charge(x, v)")

    @property
    def is_functional(self) -> bool:
        """Not in training with normalisation: each step updates the statistics."""
        return not self.training or (isinstance(self.vbn, nn.Identity) and not self.fold_bn)

    # --------------------------------------------------------------------------------------------- before the fold

    def step(self, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if self.fold_bn:
            s, v, *statistics = self.folded_step(x, v, self.mu, self.sigma2, self.momentum)
            if self.training:
                self.mu, self.sigma2, self.momentum = statistics
            return s, v
        vth = self.threshold(x)
        h = self.vbn(self.pre_charge(x, v))
        s = self.surrogate_function(h - vth)
        v = self.reset_by(h, s, vth)
        return s, v

    def threshold(self, x: Tensor) -> Tensor | float:
        """vth: v_threshold, or one value a channel, broadcastable over a step."""
        if self.learnable_vth:
            return self.per_channel(torch.exp(self.a).to(x.dtype))
        if isinstance(self.v_threshold, Tensor):
            return self.per_channel(self.v_threshold.to(x.dtype))
        return self.v_threshold

    def reset_by(self, h: Tensor, s: Tensor, vth: Tensor | float) -> Tensor:
        """The membrane potential after the spikes s; the soft reset subtracts vth."""
        if self.detach_reset:
            s = s.detach()
        if self.v_reset is None:
            return h - s * vth
        return s * self.v_reset + (1 - s) * h

    def per_channel(self, value: Tensor) -> Tensor:
        """[C] as [C] for 2-D, [C, 1, 1] for 4-D input."""
        return value if self.dim == 2 else value.view(-1, 1, 1)

    # ---------------------------------------------------------------------------------------------- after the fold

    def re_parameterize_v_threshold(self, normalize_residual: bool = False, running_stats: bool = False) -> None:
        """Fold the normalisation into the threshold.

        gamma, beta (trainable) and mu, sigma2, eps are taken from `vbn`, which becomes Identity; a learned exp(a)
        becomes the fixed threshold. Folding again, or folding a neuron without normalisation, warns and does nothing.

        Args:
            normalize_residual: carry the normalised potential on, which makes the folded neuron equal to the unfolded
                one in eval mode. False carries the raw h on: cheaper hardware, another network; its soft reset
                subtracts the folded threshold.
            running_stats: in test-time adaptation, average mu and sigma2 over the steps instead of replacing them.
        """
        check_bool("normalize_residual", normalize_residual)
        check_bool("running_stats", running_stats)
        if isinstance(self.vbn, nn.Identity):
            reason = "it is folded already" if self.fold_bn else "it has no batch normalisation (mpbn=False)"
            warnings.warn(f"re_parameterize_v_threshold does nothing: {reason}", stacklevel=2)
            return
        if self.learnable_vth:
            learned = torch.exp(self.a.detach())
            del self.a, self.v_threshold
            self.register_buffer("v_threshold", learned)
            self.learnable_vth = False
        self.gamma, self.beta, self.eps = self.vbn.weight, self.vbn.bias, self.vbn.eps
        self.register_buffer("mu", self.vbn.running_mean)
        self.register_buffer("sigma2", self.vbn.running_var)
        self.register_buffer("momentum", torch.full_like(self.mu[0], self.bn_momentum))
        self.vbn = nn.Identity()
        self.fold_bn = True
        self.normalize_residual = normalize_residual
        self.running_stats = running_stats

    def folded_step(
        self, x: Tensor, v: Tensor, mu: Tensor, sigma2: Tensor, momentum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(x, v, statistics) -> (s, v, statistics): one step against the folded threshold."""
        h = self.pre_charge(x, v)
        if self.training:
            mu, sigma2, momentum = self.adapt(h, mu, sigma2, momentum)
        vth = self.threshold(x)
        mean, gamma, beta = self.per_channel(mu), self.per_channel(self.gamma), self.per_channel(self.beta)
        deviation = self.per_channel(torch.sqrt(sigma2 + self.eps))

        is_zero = gamma == 0  # such a channel is constant: BN(h) is beta
        folded = (vth - beta) * deviation / torch.where(is_zero, 1, gamma) + mean
        s = self.surrogate_function(torch.where(is_zero, beta - vth, (h - folded) * torch.sign(gamma)))

        if self.normalize_residual:
            v = self.reset_by((h - mean) / deviation * gamma + beta, s, vth)
        else:
            v = self.reset_by(h, s, folded)
        return s.to(x.dtype), v.to(x.dtype), mu, sigma2, momentum

    def adapt(self, h: Tensor, mu: Tensor, sigma2: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Test-time adaptation: the statistics of this step's batch, or their running average with the ones before."""
        if self.dim == 2 and h.shape[0] == 1:
            return mu, sigma2, momentum  # one row has no variance
        over = (0,) if self.dim == 2 else (0, 2, 3)
        batch_mu = h.detach().mean(over)
        batch_sigma2 = h.detach().var(over, correction=1)
        if not self.running_stats:
            return batch_mu, batch_sigma2, momentum
        mu = mu * (1 - momentum) + batch_mu * momentum
        sigma2 = sigma2 * (1 - momentum) + batch_sigma2 * momentum
        return mu, sigma2, torch.clamp_min(momentum * self.bn_decay_momentum, self.bn_min_momentum)

    # ------------------------------------------------------------------------------------------------------ a call

    def states_for(self, x: Tensor) -> list[Tensor]:
        if x.dim() != self.dim or x.shape[1] != self.channels:
            wanted = "[N, out_features]" if self.dim == 2 else "[N, out_channels, H, W]"
            raise ValueError(
                f"x must be {wanted} with {self.channels} channels at each step, 2-D or 4-D as constructed, but is "
                f"{list(x.shape)}"
            )
        return super().states_for(x)

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        if not self.fold_bn:
            return super().multi_step_forward(x_seq)
        check_sequence(x_seq)
        (v,) = self.states_for(x_seq[0])
        mu, sigma2, momentum = self.mu, self.sigma2, self.momentum
        s_seq, v_seq = [], []
        for x in x_seq.unbind(0):
            s, v, mu, sigma2, momentum = self.folded_step(x, v, mu, sigma2, momentum)
            s_seq.append(s)
            v_seq.append(v)
        self.keep([v])
        if self.training:
            self.mu, self.sigma2, self.momentum = mu, sigma2, momentum
        if self.store_v_seq:
            self.v_seq = torch.stack(v_seq)
        return torch.stack(s_seq)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, folded={self.fold_bn}, {super().extra_repr()}"


class MPBNLIFNode(MPBNBaseNode):
    r"""LIF neuron with membrane potential batch normalisation.

    Args:
        tau: membrane time constant in steps, a float greater than 1.
        decay_input: whether the input is divided by tau as well; the charge is that of `LIFNode`.
        Others: see `MPBNBaseNode`, as are the shapes and errors.

    Raises: ValueError where tau is not a float greater than 1.
    """

    def __init__(self, tau: float = 2.0, decay_input: bool = False, *args, **kwargs):
        check_tau("tau", tau)
        check_bool("decay_input", decay_input)
        super().__init__(*args, **kwargs)
        self.tau = tau
        self.decay_input = decay_input

    def pre_charge(self, x: Tensor, v: Tensor) -> Tensor:
        if self.decay_input:
            if not self.v_reset:
                return v + (x - v) / self.tau
            return v + (x - (v - self.v_reset)) / self.tau
        if not self.v_reset:
            return v * (1 - 1 / self.tau) + x
        return v - (v - self.v_reset) / self.tau + x

    def extra_repr(self) -> str:
        return f"tau={self.tau}, decay_input={self.decay_input}, {super().extra_repr()}"
