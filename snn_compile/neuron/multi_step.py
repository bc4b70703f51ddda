"""Modules that only take whole sequences."""

from __future__ import annotations

from torch import nn

from snn_compile.neuron.checks import check_choice


class MultiStepModule(nn.Module):
    """A module without carried states whose input is always [T, N, *]: its step mode is 'm', anything else raises."""

    step_modes: tuple[str, ...] = ("m",)

    @property
    def step_mode(self) -> str:
        return "m"

    @step_mode.setter
    def step_mode(self, mode: str) -> None:
        check_choice("step_mode", mode, self.step_modes)
