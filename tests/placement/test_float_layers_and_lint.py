"""What the planner leaves float and what the linter asks to leave float agree."""

import itertools

import pytest

from pytorch_quant.export.lint.float_layers import (
    fp8_conv_reason,
    int8_conv_reason,
    small_product_reason,
    vector_reason,
)
from pytorch_quant.placement.float_layers import ConvShape, ProductShape, reason_to_leave
from pytorch_quant.placement.rules import Rules
from pytorch_quant.scheme import FP8

DEFAULT = Rules(None).bind({}, {"site": "conv"}).choice("site", "conv")


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 1), (7, 7)])
@pytest.mark.parametrize("groups", [1, 8])
def test_what_the_planner_quantizes_the_linter_accepts(first, kernel, groups):
    quantized = 0
    for c_in, c_out in itertools.product((1, 3, 8, 12, 15, 16, 24, 64), repeat=2):
        if first and c_in > 4:
            continue
        reason = reason_to_leave(ConvShape(c_in, c_out, kernel, groups, first), DEFAULT)
        if reason is None:
            quantized += 1
            assert int8_conv_reason(c_in, c_out, groups, kernel, first) is None
    assert quantized or first


def test_products():
    for m, k, n in itertools.product((None, 1, 2, 64), (1, 15, 16, 64), (1, 15, 16, 64)):
        planned = reason_to_leave(ProductShape(m, k, n), DEFAULT)
        linted = vector_reason(m, n) or small_product_reason(k, n)
        assert (planned is None) == (linted is None), (m, k, n, planned, linted)


def test_fp8_convolutions():
    choice = Rules({"*": FP8}).bind({}, {"site": "conv"}).choice("site", "conv")
    for c_in, c_out in itertools.product((3, 16, 17, 64), repeat=2):
        for kernel in ((1, 1), (5, 5), (7, 7)):
            if reason_to_leave(ConvShape(c_in, c_out, kernel, 1), choice) is None:
                assert fp8_conv_reason(c_in, c_out, kernel) is None
