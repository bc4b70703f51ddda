"""Marks: `gpu` is skipped where there is no CUDA or ROCm device; `slow` is only a label (`-m "not slow"`)."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():  # ROCm builds answer here too
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))
