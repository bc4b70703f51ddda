"""The example that draws every neuron runs, and it draws every neuron that has a response of its own."""

from __future__ import annotations

import pytest

from snn_compile import neuron

pytest.importorskip("matplotlib")

from examples import neuron_responses

#: of another neuron's dynamics, abstract, or without dynamics until trained
ELSEWHERE = {
    "BaseNode",
    "StatefulModule",
    "MPBNBaseNode",
    "NonSpikingBaseNode",
    "ILCBaseNode",
    "SimpleIFNode",
    "SimpleLIFNode",
    "NonSpikingIFNode",
    "ILCIFNode",
    "ILCLIFNode",
    "PSN",
    "MaskedPSN",
}


def test_every_neuron_is_drawn(tmp_path, capsys):
    drawn = {type(make()).__name__ for _, make, _ in neuron_responses.NEURONS}
    assert drawn | ELSEWHERE == set(neuron.__all__)
    picture = tmp_path / "responses.png"
    neuron_responses.main(["--output", str(picture)])
    assert picture.stat().st_size > 10_000
    assert str(picture) in capsys.readouterr().out
