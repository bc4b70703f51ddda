"""The `triton` column of the op table, op by op, on NaN, infinities, both zeros, halves and denormals."""

from __future__ import annotations

import pytest
import torch

from snn_compile.lowering.ops import TABLE
from tests.lowering.triton.op_cases import ALL_OVERLOADS, arguments, check_division_by_a_number, check_op

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_op_equals_eager(interpreted, dtype, subtests):
    for overload in ALL_OVERLOADS:
        with subtests.test(overload):
            interpreted(check_op, overload, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_division_by_a_number_multiplies_by_its_reciprocal(interpreted, dtype):
    interpreted(check_division_by_a_number, dtype)


def test_every_overload_has_a_case():
    assert not [o for o in TABLE if not any(arguments(o, d) for d in DTYPES)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_op_equals_eager_on_the_device(dtype, subtests):
    for overload in ALL_OVERLOADS:
        with subtests.test(overload):
            check_op(overload, dtype, "cuda")
