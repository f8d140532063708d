"""What stays float by default: H1 to H5."""

import pytest

from pytorch_quant.placement.float_layers import ConvShape, ProductShape, reason_to_leave
from pytorch_quant.placement.rules import Choice
from pytorch_quant.scheme import FP8, INT4_WEIGHT_ONLY, INT8, INT8_PER_TENSOR

DEFAULT = Choice(INT8)
SQUARE = (3, 3)

CONVOLUTIONS = [
    # input channels of a group, output channels, kernel, groups, first; the rule
    ((16, 16, SQUARE, 1), None),
    ((64, 64, (1, 7), 1), None),
    ((15, 64, SQUARE, 1), "H3"),
    ((8, 64, SQUARE, 1), "H3"),
    ((3, 64, (7, 7), 1), "H3"),
    ((3, 64, (7, 7), 1, True), None),
    ((3, 64, (7, 5), 1, True), "H3"),
    ((3, 12, SQUARE, 1, True), "H3"),
    ((1, 8, SQUARE, 1, True), None),
    ((32, 8, (1, 1), 1), None),
    ((32, 5, (1, 1), 1), None),
    ((33, 5, (1, 1), 1), "H3"),
    ((33, 8, (1, 1), 1), None),
    ((32, 8, (1, 3), 1), "H3"),
    ((64, 3, SQUARE, 1), None),
    ((1, 64, SQUARE, 64), None),
    ((1, 58, SQUARE, 58), "H3"),
    ((1, 64, (1, 1), 64), "H3"),
    ((1, 64, (3, 1), 64), "H3"),
    ((4, 128, SQUARE, 32), None),
    ((1, 64, (3,), 64), None),
    ((16, 16, (1, 1), 2), None),
]


@pytest.mark.parametrize(("sizes", "rule"), CONVOLUTIONS)
def test_convolutions(sizes, rule):
    reason = reason_to_leave(ConvShape(*sizes), DEFAULT)
    assert (reason is None) if rule is None else f"({rule})" in reason


PRODUCTS = [
    # m, k, n, length of the softmax; the rule
    ((None, 16, 16), None),
    ((None, 15, 16), "H2"),
    ((None, 512, 15), "H2"),
    ((None, 512, 1), "H1"),
    ((1, 64, 64), "H1"),
    ((2, 64, 64), None),
    ((8, 8, 64), "H2"),
    ((512, 64, 512, 512), None),
    ((513, 64, 513, 513), "H5"),
    ((600, 64, 600), None),
    ((None, None, None), None),
]


@pytest.mark.parametrize(("sizes", "rule"), PRODUCTS)
def test_products(sizes, rule):
    reason = reason_to_leave(ProductShape(*sizes), DEFAULT)
    assert (reason is None) if rule is None else f"({rule})" in reason


@pytest.mark.parametrize("kind", ["type", "glob", "exact"])
def test_a_rule_that_chose_the_layer_is_followed(kind):
    choice = Choice(INT8_PER_TENSOR, kind)
    assert reason_to_leave(ConvShape(3, 5, SQUARE, 1), choice) is None
    assert reason_to_leave(ProductShape(1, 2, 3, 900), choice) is None


def test_another_default_is_no_choice():
    assert "H3" in reason_to_leave(ConvShape(3, 5, SQUARE, 1), Choice(INT8_PER_TENSOR))


FP8_CONVOLUTIONS = [
    ((64, 64, (3, 3), 1), None),
    ((16, 64, (3, 3), 1), "H4"),
    ((64, 16, (3, 3), 1), "H4"),
    ((17, 17, (5, 5), 1), None),
    ((3, 64, (3, 3), 1, True), "H4"),
    ((64, 64, (6, 6), 1), "H4"),
    ((64, 64, (4, 8), 1), None),
]


@pytest.mark.parametrize(("sizes", "rule"), FP8_CONVOLUTIONS)
@pytest.mark.parametrize("kind", ["default", "type", "glob"])
def test_convolutions_in_fp8(sizes, rule, kind):
    reason = reason_to_leave(ConvShape(*sizes), Choice(FP8, kind))
    assert (reason is None) if rule is None else f"({rule})" in reason


def test_an_exact_name_overrules_h4():
    assert reason_to_leave(ConvShape(3, 8, SQUARE, 1), Choice(FP8, "exact")) is None


def test_what_has_no_rule():
    assert reason_to_leave(None, DEFAULT) is None
    assert reason_to_leave(ProductShape(None, 2, 2), Choice(None)) is None
    assert reason_to_leave(ProductShape(None, 2, 2), Choice(INT4_WEIGHT_ONLY, "exact")) is None
