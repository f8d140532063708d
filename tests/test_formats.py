import numpy as np
import pytest
import torch

from pytorch_quant.formats import FloatFormat, IntFormat, make_format, parse_format


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_integer_bounds(bits, unsigned, narrow):
    fmt = make_format(bits, unsigned, narrow)
    if unsigned:
        assert (fmt.qmin, fmt.qmax) == (0, 2**bits - 1)
    else:
        assert (fmt.qmin, fmt.qmax) == (-(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1)
    assert fmt.bound == fmt.qmax
    info = torch.iinfo(fmt.storage)
    assert info.min <= fmt.qmin and fmt.qmax <= info.max
    assert parse_format(fmt.name) == fmt
    assert len(fmt.magnitudes()) == fmt.bound + 1


def every_finite_e4m3():
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    values = codes.float()
    return values[~values.isnan()]


def test_e4m3_rounds_as_the_hardware_type():
    fmt = make_format((4, 3))
    grid = every_finite_e4m3()
    between = (grid.sort().values[1:] + grid.sort().values[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(200_000, generator=generator) * torch.logspace(-6, 3, 200_000)
    x = torch.cat([grid, between, random.clamp(-448, 448)])
    assert torch.equal(fmt.round(x), x.to(torch.float8_e4m3fn).float())
    assert fmt.round(torch.tensor([1e9, -torch.inf])).tolist() == [448.0, -448.0]


def test_magnitudes_of_floating_point_formats():
    expected = every_finite_e4m3().abs().unique().numpy()
    np.testing.assert_array_equal(FloatFormat(4, 3).magnitudes(), expected)
    assert FloatFormat(2, 1).magnitudes().tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_e2m1_rounds_to_the_nearest_magnitude():
    fmt = FloatFormat(2, 1)
    x = torch.linspace(-7, 7, 1401)
    rounded = fmt.round(x)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = torch.cat([-grid, grid])
    distance = (x[:, None] - grid).abs().amin(1)
    assert torch.allclose((x - rounded).abs(), distance)
    assert fmt.round(torch.tensor([0.25, 0.75, 5.0, 2.5])).tolist() == [0.0, 1.0, 4.0, 2.0]


@pytest.mark.parametrize("bits", [1, 17, 0, -8])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=f"num_bits={bits} is out of range; use 2 to 16"):
        make_format(bits)


@pytest.mark.parametrize("bits", [(5, 2), (4, 4), 8.0, "8", True, None])
def test_bits_of_the_wrong_kind(bits):
    with pytest.raises(TypeError, match="num_bits"):
        make_format(bits)


def test_floating_point_formats_are_signed():
    with pytest.raises(ValueError, match="signed floating-point"):
        make_format((4, 3), unsigned=True)


def test_parse_rejects_what_is_no_format():
    with pytest.raises(ValueError, match="not a number format"):
        parse_format("float")


def test_formats_are_values():
    assert IntFormat(8) == make_format(8) and hash(IntFormat(8)) == hash(make_format(8))
