"""The errors that existing programs and tests expect: type and key phrase."""

import numpy as np
import pytest
import torch


def unseen(old):
    return old.nn.TensorQuantizer(old.tensor_quant.QuantDescriptor())


def changed_shape(old):
    calibrator = old.calib.MaxCalibrator(8, 0, False)
    calibrator.collect(torch.ones(3, 2))
    calibrator.collect(torch.ones(4, 2))


def percentile(value):
    def run(old):
        calibrator = old.calib.HistogramCalibrator(8, None, False)
        calibrator.collect(torch.rand(100))
        calibrator.compute_amax("percentile", percentile=value)

    return run


def clip(old):
    bound = torch.ones(3, requires_grad=True)
    old.nn.functional.clip(torch.randn(2, 3), -bound, bound)


def negative(old):
    old.tensor_quant.tensor_quant(torch.tensor([-1.0, 1.0]), torch.tensor(1.0), 8, True)


def half(old):
    x = torch.full((4,), 1e-4).half()
    old.tensor_quant.tensor_quant(x, torch.tensor(1e-4).half(), 8)


def nested(*arguments):
    def run(old):
        groups = old.package.optim.helper.group_parameters
        groups(torch.nn.Linear(2, 2), *arguments)

    return run


def descriptor(**fields):
    return lambda old: old.tensor_quant.QuantDescriptor(**fields)


def layer_of_codes(old):
    desc = old.tensor_quant.QuantDescriptor(fake_quant=False)
    old.nn.QuantLinear(2, 2, quant_desc_input=desc)


ERRORS = {
    "unknown keyword of a descriptor": (descriptor(colour=1), TypeError, "Unused keys"),
    "unknown keyword of a layer": (
        lambda old: old.nn.QuantConv2d(2, 2, 1, colour=1),
        TypeError,
        "Unused keys",
    ),
    "unknown keyword of a pooling layer": (
        lambda old: old.nn.QuantMaxPool2d(2, colour=1),
        TypeError,
        "Unused keys",
    ),
    "amax of a wrong type": (
        descriptor(amax="oops"),
        TypeError,
        "amax must be float, list or ndarray",
    ),
    "amax as a tensor": (
        descriptor(amax=torch.tensor(1.0)),
        TypeError,
        "amax must be float, list or ndarray",
    ),
    "learned amax with an axis": (
        descriptor(learn_amax=True, axis=0),
        TypeError,
        "axis is ignored and must be None",
    ),
    "floating-point format": (descriptor(num_bits=(5, 2)), TypeError, "num_bits"),
    "codes from a layer": (layer_of_codes, ValueError, "Only fake quantization is supported"),
    "kept axis changed": (changed_shape, RuntimeError, "shape changed"),
    "percentile below": (percentile(-1), ValueError, "range"),
    "percentile above": (percentile(100.5), ValueError, "range"),
    "unseen": (
        lambda old: unseen(old).load_calib_amax(),
        RuntimeError,
        "Calibrator returned None",
    ),
    "learned bound": (
        lambda old: old.nn.modules.clip.Clip(torch.ones(3), torch.ones(3), True, True),
        ValueError,
        "must be scalar",
    ),
    "functional bound": (clip, ValueError, "can only be scalar"),
    "negative values in integer form": (negative, TypeError, "Negative values encountered"),
    "scale beyond fp16": (half, ValueError, "scale is too large for FP16"),
    "patterns not nested": (
        nested(["weight"]),
        TypeError,
        "must be list of list of patterns",
    ),
    "rates do not match": (nested([["weight"]], [0.1, 0.2]), TypeError, "must match"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_error(old, what):
    run, kind, phrase = ERRORS[what]
    with pytest.raises(kind, match=phrase):
        run(old)


def test_unseen_without_strict_is_nan(old):
    quantizer = unseen(old)
    quantizer.load_calib_amax(strict=False)
    assert quantizer.amax.isnan().all()


def test_amax_reads_back_as_float32_array(old):
    for amax in (2, 2.0, [1.0, 2.0], np.array([1.0, 2.0])):
        axis = None if np.ndim(amax) == 0 else 0
        stored = old.tensor_quant.QuantDescriptor(amax=amax, axis=axis).amax
        assert isinstance(stored, np.ndarray) and stored.dtype == np.float32
        np.testing.assert_array_equal(stored, amax)


def test_tracked_maxima(old):
    calibrator = old.calib.MaxCalibrator(8, None, False, track_amax=True)
    for value in (1.0, 3.0, 2.0):
        calibrator.collect(torch.tensor([value, -0.5]))
    assert [float(a) for a in calibrator.amaxs] == [1.0, 3.0, 2.0]


def test_histogram_arguments_and_pre_quant_scale(old):
    calibrator = old.calib.HistogramCalibrator(8, None, False, 64, None, True, True)
    assert (calibrator._num_bins, calibrator._skip_zeros) == (64, True)
    calibrator._torch_hist = False
    calibrator.collect(torch.tensor([0.0, 0.5, -1.0]))
    assert int(calibrator._calib_hist.sum()) == 2 and len(calibrator._calib_bin_edges) == 65
    quantizer = old.nn.TensorQuantizer(old.tensor_quant.QuantDescriptor(amax=127.0))
    for scale in (2.0, torch.tensor([2.0, 4.0])):
        quantizer.pre_quant_scale = scale
        got = quantizer(torch.tensor([[1.2, 1.2]]))
        np.testing.assert_array_equal(
            got, np.rint(np.float32(1.2) * np.broadcast_to(scale, (1, 2)))
        )
