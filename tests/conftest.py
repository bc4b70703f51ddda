"""Results are poisoned before every kernel.

Marks: `gpu` is skipped where there is no CUDA or ROCm device; `slow` is only a label (`-m "not slow"`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snn_compile.lowering import launch
from snn_compile.lowering.cpp import target as cpp


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results hold NaN (integers: their largest value), scratch memory ones: what a kernel does not write shows."""
    allocate = launch.ResultSpec.allocate

    def poisoned(self: launch.ResultSpec, device: torch.device) -> Tensor:
        result = allocate(self, device)
        if result.dtype == torch.bool:
            return result
        return result.fill_(float("nan") if result.is_floating_point() else torch.iinfo(result.dtype).max)

    monkeypatch.setattr(launch.ResultSpec, "allocate", poisoned)
    monkeypatch.setattr(cpp, "allocate_scratch", lambda n: torch.full((n,), 255, dtype=torch.uint8))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():  # ROCm builds answer here too
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))
