import pytest

from snn_compile.passes.unroll import unroll
from tests.passes.capture import rerolled, x
from tests.passes.test_reroll import LOOPS


@pytest.mark.parametrize("function", LOOPS, ids=lambda f: f.__name__)
def test_unrolling_is_the_inverse_of_rerolling(function):
    captured = rerolled(function, x())

    def rewrite(gm):
        for call, loop in captured.loops():
            unroll(gm, call, loop)

    captured.check(rewrite)
    assert not captured.loops()
