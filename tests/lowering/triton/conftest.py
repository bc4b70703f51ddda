from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lowering.triton.interpreter import interpreter


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """``interpreted(function, *args, **kwargs)`` runs it where Triton kernels are interpreted, on CPU tensors."""
    pytest.importorskip("triton")
    with interpreter() as call:
        yield call
