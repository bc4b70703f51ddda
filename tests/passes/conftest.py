"""Inductor compiles nothing here, where it is no part of what is tested: one of its kernels takes as long as three of ours."""

import pytest


@pytest.fixture(autouse=True)
def without_inductor(request: pytest.FixtureRequest) -> None:
    if not request.node.get_closest_marker("inductor"):
        request.getfixturevalue("op_by_op")
