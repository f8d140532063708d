import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import amax_of

from pytorch_quant import axes


@given(st.data())
def test_reduce_amax_equals_numpy(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    kept = data.draw(st.sets(st.integers(-len(shape), -1), max_size=len(shape)))
    axis = axes.canonical_axis(tuple(kept))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    got = axes.reduce_amax(x, axis)
    np.testing.assert_array_equal(got.numpy(), amax_of(x.numpy(), axis))
    assert tuple(got.shape) == axes.amax_shape(shape, axis)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_reduce_amax_keeps_the_dtype(dtype):
    x = torch.tensor([[1.0, -3.0], [2.0, 0.5]], dtype=dtype)
    got = axes.reduce_amax(x, 0)
    assert got.dtype == dtype and got.tolist() == [[3.0], [2.0]]


def test_reduce_amax_of_nothing_is_zero_and_nan_propagates():
    assert axes.reduce_amax(torch.empty(0, 3)).item() == 0
    assert axes.reduce_amax(torch.empty(0, 3), 1).tolist() == [[0, 0, 0]]
    assert axes.reduce_amax(torch.tensor([1.0, torch.nan])).isnan()
    assert axes.reduce_amax(torch.tensor([[1.0, torch.nan], [1, 2]]), 0)[0].isnan()


def test_reduce_amax_of_every_axis_kept():
    x = torch.tensor([[1.0, -2.0]])
    assert axes.reduce_amax(x, (0, 1)).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("axis", [4, -5])
def test_axis_out_of_range(axis):
    with pytest.raises(ValueError, match=f"axis {axis} is out of range for a tensor of 4 dim"):
        axes.reduce_amax(torch.zeros(1, 2, 3, 4), axis)


def test_axis_of_a_scalar():
    with pytest.raises(ValueError, match="use axis=None"):
        axes.kept_axes(0, 0)


def test_axis_named_twice():
    with pytest.raises(ValueError, match="twice"):
        axes.canonical_axis((0, 0))
    with pytest.raises(ValueError, match="twice"):
        axes.kept_axes((0, -2), 2)


@pytest.mark.parametrize("axis", ["0", 1.5, True, (True,), ("a",)])
def test_axis_of_the_wrong_type(axis):
    with pytest.raises(TypeError, match="axis must be"):
        axes.canonical_axis(axis)


def test_canonical_forms():
    assert axes.canonical_axis((2,)) == 2
    assert axes.canonical_axis([1, 0]) == (0, 1)
    assert axes.canonical_axis(()) is None


@pytest.mark.parametrize(
    ("shape", "axis", "fits"),
    [
        ((), None, True),
        ((1,), None, True),
        ((8, 1, 1, 1), None, False),
        ((8, 1, 1, 1), 0, True),
        ((1, 8, 1, 1), 0, False),
        ((1, 8, 1, 1), 1, True),
        ((), 0, True),
        ((8, 4), (0, 1), True),
        ((8,), 3, True),
        ((8,), (0, 3), False),
    ],
)
def test_fits_axis(shape, axis, fits):
    assert axes.fits_axis(shape, axis) is fits


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_groups_round_trip_and_hold_neighbours(axis):
    x = torch.arange(4 * 8 * 12).reshape(4, 8, 12).float()
    rows = axes.to_groups(x, axis, 4)
    assert rows.shape == (96, 4)
    assert torch.equal(axes.from_groups(rows, x.shape, axis), x)
    # Neighbours along the axis are one stride apart.
    step = x.stride()[axis]
    assert torch.equal(rows[:, 1:] - rows[:, :-1], torch.full((96, 3), float(step)))


def test_groups_run_in_the_order_of_an_onnx_scale():
    x = torch.arange(12.0).reshape(2, 6)
    assert axes.to_groups(x, 1, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_block_size_that_does_not_divide():
    with pytest.raises(ValueError, match="length 6, which is not a multiple of block_size=4"):
        axes.to_groups(torch.zeros(2, 6), 1, 4)
