import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytorch_quant import QuantDescriptor, scheme


def test_defaults():
    d = QuantDescriptor()
    assert (d.num_bits, d.axis, d.amax, d.fake_quant, d.unsigned) == (8, None, None, True, False)
    assert d.dict() == {}


def test_positional_form():
    d = QuantDescriptor(4, "activation")
    assert (d.num_bits, d.name) == (4, "activation")


floats = st.floats(0, 2.0**100, width=32)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "num_bits": st.one_of(st.integers(2, 16), st.just((4, 3)), st.just((2, 1))),
            "name": st.text(max_size=5),
            "fake_quant": st.booleans(),
            "axis": st.one_of(st.none(), st.integers(-4, 4), st.just((0, 2))),
            "amax": st.one_of(st.none(), floats, st.lists(floats, min_size=1, max_size=1)),
            "scale_amax": st.floats(0.01, 10),
            "calib_method": st.sampled_from(["max", "histogram"]),
        },
    )
)
def test_dict_and_yaml_round_trips_are_exact(fields):
    d = QuantDescriptor(**fields)
    for back in (
        QuantDescriptor(**d.dict()),
        QuantDescriptor.from_yaml(d.to_yaml()),
        pickle.loads(pickle.dumps(d)),
        copy.deepcopy(d),
        d.replace(),
    ):
        assert back == d and hash(back) == hash(d)


@pytest.mark.parametrize(
    "fields",
    [
        {"axis": 0, "amax": [0.1, 0.2, 1e-30]},
        {"unsigned": True, "narrow_range": True},
        {"learn_amax": True},
        {"axis": 1, "block_size": 32, "num_bits": 4},
        {"dynamic": True},
        {"axis": (0, 1)},
    ],
)
def test_yaml_round_trip_of_particular_fields(fields):
    d = QuantDescriptor(**fields)
    assert QuantDescriptor.from_yaml(d.to_yaml()) == d
    assert all(getattr(d, k) == v for k, v in fields.items() if k != "amax")


def test_amax_reads_back_as_float32():
    d = QuantDescriptor(axis=0, amax=[1, 2.5])
    assert isinstance(d.amax, np.ndarray) and d.amax.dtype == np.float32
    assert not d.amax.flags.writeable
    assert QuantDescriptor(amax=3).amax == np.float32(3)


def test_frozen():
    d = QuantDescriptor()
    with pytest.raises(AttributeError, match=r"frozen; use descriptor.replace\(num_bits="):
        d.num_bits = 4
    assert d.replace(num_bits=4).num_bits == 4 and d.num_bits == 8


def test_descriptors_differ_by_amax():
    assert QuantDescriptor(amax=1.0) != QuantDescriptor(amax=2.0)
    assert QuantDescriptor(amax=1.0) != QuantDescriptor()
    assert len({QuantDescriptor(amax=1.0), QuantDescriptor(amax=1.0)}) == 1
    assert QuantDescriptor() != "descriptor"


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"nunm_bits": 4}, TypeError, r"Unused keys: 'nunm_bits' \(did you mean 'num_bits'\?\)"),
        ({"num_bits": 17}, ValueError, "out of range"),
        ({"num_bits": (5, 2)}, TypeError, "not a supported floating-point format"),
        ({"amax": "1"}, TypeError, "amax must be float, list or ndarray"),
        ({"amax": -1.0}, ValueError, "finite and >= 0"),
        ({"amax": float("nan")}, ValueError, "finite and >= 0"),
        ({"amax": [1.0, 2.0]}, ValueError, "2 values but axis is None"),
        ({"learn_amax": True, "axis": 0}, TypeError, "axis is ignored and must be None"),
        ({"calib_method": "entropyy"}, ValueError, "unknown calib_method 'entropyy'"),
        ({"scale_amax": 0.0}, ValueError, "scale_amax must be finite and > 0"),
        ({"scale_amax": "1"}, TypeError, "scale_amax must be a number"),
        ({"axis": "0"}, TypeError, "axis must be"),
        ({"unsigned": 1}, TypeError, "unsigned must be True or False"),
        ({"name": 3}, TypeError, "name must be a string"),
        ({"block_size": 32}, ValueError, "needs axis="),
        ({"block_size": 0, "axis": 0}, ValueError, "at least 1"),
        ({"block_size": 1.0, "axis": 0}, TypeError, "must be an int"),
        ({"dynamic": True, "axis": 0, "num_bits": 4}, ValueError, "leave out num_bits, axis"),
    ],
)
def test_bad_fields(fields, error, message):
    with pytest.raises(error, match=message):
        QuantDescriptor(**fields)


def test_yaml_that_is_no_mapping():
    with pytest.raises(TypeError, match="mapping"):
        QuantDescriptor.from_yaml("[1, 2]")


def test_presets():
    assert scheme.INT8.weight_for(1) == QuantDescriptor(8, axis=1)
    assert scheme.INT8_PER_TENSOR.weight_for(0) == QuantDescriptor(8)
    assert scheme.INT8_DYNAMIC.input.dynamic
    assert scheme.FP8.input.num_bits == (4, 3)
    assert scheme.INT4_WEIGHT_ONLY.input is None
    assert set(scheme.PRESETS) == {
        "INT8",
        "INT8_PER_TENSOR",
        "INT8_DYNAMIC",
        "FP8",
        "INT4",
        "INT4_WEIGHT_ONLY",
    }
