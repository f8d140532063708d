"""Where the old package was wrong: the rows of the migration guide that no other test covers.

Repeated `initialize()` is in `test_quant_modules`, padding, `device=` and `dtype=` in
`nn/test_layers`, YAML in `test_descriptor`, loading on a CPU in `nn/test_tensor_quantizer`.
"""

import pytest
import reference
import torch


def collected(old, *batches):
    calibrator = old.calib.HistogramCalibrator(8, None, False)
    for x in batches:
        calibrator.collect(x)
    return calibrator


def test_counts_past_two_to_the_24(old):
    many = torch.full((2**24 + 3,), 0.25)
    calibrator = collected(old, many, many, torch.tensor([1.0]))
    assert int(calibrator._calib_hist.max()) == 2**25 + 6
    assert int(calibrator._calib_hist.sum()) == 2**25 + 7


def test_the_entropy_search_leaves_its_histogram_alone(old):
    calibrator = collected(old, torch.randn(20_000).relu())
    before = calibrator._calib_hist.clone()
    first = calibrator.compute_amax("entropy")
    assert torch.equal(calibrator._calib_hist, before)
    assert torch.equal(calibrator.compute_amax("entropy"), first)


def test_an_all_zero_first_batch(old):
    calibrator = collected(old, torch.zeros(100), torch.randn(1000))
    assert int(calibrator._calib_hist[0]) >= 100
    for method in ("percentile", "mse", "entropy"):
        assert 0 < calibrator.compute_amax(method) < 5


def test_no_export_mode_survives_an_exception(old):
    quantizer, x = old.nn.TensorQuantizer(), torch.randn(100)
    expected = quantizer(x)
    with pytest.raises(ZeroDivisionError), old.package.enable_onnx_export():
        raise ZeroDivisionError
    assert torch.equal(quantizer(x), expected)


def test_a_grouped_per_channel_checkpoint_loads(old):
    layer = old.nn.QuantConvTranspose2d(4, 4, 2, groups=2)
    assert layer._weight_quantizer.axis is None
    state = {**layer.state_dict(), "_weight_quantizer._amax": torch.rand(1, 2, 1, 1) + 0.5}
    layer.load_state_dict(state)
    assert layer._weight_quantizer.axis == 1
    amax = state["_weight_quantizer._amax"]
    weight = torch.from_numpy(reference.fake_quant(layer.weight.detach().numpy(), amax.numpy()))
    quantized = layer._weight_quantizer(layer.weight)
    assert torch.equal(quantized, weight)


def test_e4m3_has_no_form_in_torch_and_keeps_its_own(old):
    quantizer = old.nn.TensorQuantizer(old.tensor_quant.QuantDescriptor((4, 3), amax=1.0))
    x = torch.rand(100)
    expected = quantizer(x)
    quantizer.use_fb_fake_quant = True
    assert torch.equal(quantizer(x), expected)
