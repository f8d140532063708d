import copy
import io
import pickle

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pytorch_quant import CalibrationError, QuantDescriptor, TensorQuantizer
from pytorch_quant import nn as quant_nn


def quantizer(amax=None, **fields):
    return TensorQuantizer(QuantDescriptor(amax=amax, **fields))


@given(
    st.integers(2, 16),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0, 1, -1, (0, 2)]),
    st.booleans(),
)
def test_quantizes_as_the_formula(bits, unsigned, narrow, axis, static):
    x = torch.randn(4, 5, 6) * 3
    if unsigned:
        x = x.abs()
    amax = reference.amax_of(x.numpy(), axis)
    q = quantizer(axis=axis, num_bits=bits, unsigned=unsigned, narrow_range=narrow)
    if static:
        amax = amax * np.float32(0.7)
        q.amax = amax
    expected = reference.fake_quant(x.numpy(), amax, bits, unsigned, narrow and not unsigned)
    np.testing.assert_array_equal(q(x).numpy(), expected)


def test_uncalibrated_takes_the_range_of_each_tensor():
    q = quantizer()
    for size in (1.0, 10.0):
        x = torch.randn(100) * size
        np.testing.assert_array_equal(q(x), reference.fake_quant(x.numpy(), x.abs().max()))
    assert q.amax is None and not hasattr(q, "_amax")


def test_dynamic_by_design():
    x = torch.randn(100) + 2
    y = quantizer(dynamic=True)(x)
    low, high = min(x.min().item(), 0), x.max().item()
    assert (x - y).abs().max() <= (high - low) / 255 / 2 + 1e-6


def test_integer_codes():
    q = quantizer(amax=2.0, fake_quant=False, num_bits=4)
    x = torch.tensor([-9.0, -1.0, 0.1, 2.0])
    assert q(x).tolist() == reference.codes(x.numpy(), 2.0, 4).tolist()
    assert q.scale == q.step_size == torch.tensor(2.0) / 7


def test_integer_codes_of_a_negative_value():
    q = quantizer(amax=2.0, fake_quant=False, unsigned=True)
    with pytest.raises(ValueError, match="TensorQuantizer: Negative values encountered"):
        q(torch.tensor([-1.0]))


def test_scale_amax():
    x = torch.randn(50)
    q = quantizer(amax=2.0, scale_amax=0.5)
    np.testing.assert_array_equal(q(x), reference.fake_quant(x.numpy(), 1.0))
    assert q.step_size == torch.tensor(1.0) / 127


def test_pre_quant_scale():
    x, scale = torch.randn(3, 4), torch.tensor([1.0, 2.0, 0.5, 3.0])
    q = quantizer(amax=2.0)
    q.pre_quant_scale = scale
    np.testing.assert_array_equal(q(x), reference.fake_quant((x * scale).numpy(), 2.0))
    q.pre_quant_scale = 2
    np.testing.assert_array_equal(q(x), reference.fake_quant((x * 2).numpy(), 2.0))
    assert "_pre_quant_scale" in q.state_dict()
    q.pre_quant_scale = None
    assert "_pre_quant_scale" not in q.state_dict()
    with pytest.raises(ValueError, match="pre_quant_scale must be finite"):
        q.pre_quant_scale = torch.nan


def test_blocks():
    x = torch.randn(3, 8)
    q = quantizer(num_bits=4, axis=1, block_size=4)
    expected = reference.fake_quant(
        x.reshape(6, 4).numpy(), reference.amax_of(x.reshape(6, 4).numpy(), 0), 4
    )
    np.testing.assert_array_equal(q(x).reshape(6, 4), expected)
    q.enable_calib()
    q(x)
    q.load_calib_amax()
    q.disable_calib()
    assert q.amax.numel() == 6
    np.testing.assert_array_equal(q(x).reshape(6, 4), expected)
    with pytest.raises(ValueError, match="not a multiple of block_size=4"):
        q(torch.randn(3, 7))


def test_learned_range():
    q = quantizer(learn_amax=True, amax=1.0)
    x = torch.tensor([-3.0, -0.5, 0.25, 5.0], requires_grad=True)
    y = q(x)
    clipped = x.detach().numpy().clip(-1, 1)
    np.testing.assert_array_equal(y.detach(), reference.fake_quant(clipped, 1.0))
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert q.clip.clip_value_min.grad == 1 and q.clip.clip_value_max.grad == 1
    assert {"clip.clip_value_min", "clip.clip_value_max"} <= set(q.state_dict())
    q.amax = 2.5
    q.init_learn_amax()
    assert (q.clip.clip_value_min.item(), q.clip.clip_value_max.item()) == (-2.5, 2.5)


def test_learned_range_of_an_unsigned_quantizer_starts_at_zero():
    q = quantizer(learn_amax=True, unsigned=True)
    assert q.clip.clip_value_min.item() == 0
    q.amax = 3.0
    q.init_learn_amax()
    assert q.clip.clip_value_min.item() == 0


def test_learned_range_needs_an_amax_to_start_from():
    with pytest.raises(RuntimeError, match="calibrate first"):
        quantizer(learn_amax=True).init_learn_amax()
    with pytest.raises(RuntimeError, match="not made with learn_amax"):
        quantizer(amax=1.0).init_learn_amax()
    with pytest.raises(RuntimeError, match="clipping needs a learned range"):
        quantizer().enable_clip()


def test_modes():
    q, x = quantizer(amax=1.0), torch.randn(10)
    quantized = q(x)
    q.disable_quant()
    assert q(x) is x
    q.enable_quant()
    assert torch.equal(q(x), quantized)
    q.disable()
    assert q(x) is x
    q.enable()
    assert torch.equal(q(x), quantized)


def test_the_loop_of_the_tutorials():
    q = TensorQuantizer(QuantDescriptor(calib_method="histogram"))
    q.disable_quant()
    q.enable_calib()
    batches = [torch.randn(1000) for _ in range(3)]
    for x in batches:
        assert q(x) is x
    q.enable_quant()
    q.disable_calib()
    for arguments in (("entropy",), ("mse",)):
        q.load_calib_amax(*arguments)
        assert 0 < q.amax <= max(x.abs().max() for x in batches)
    q.load_calib_amax("percentile", percentile=100)
    assert q.amax == max(x.abs().max() for x in batches)


def test_per_channel_calibration():
    q = quantizer(axis=0)
    q.enable_calib()
    x = torch.randn(4, 3, 2)
    q(x)
    q(x * 2)
    q.load_calib_amax()
    np.testing.assert_array_equal(q.amax, reference.amax_of(2 * x.numpy(), 0))


def test_a_calibrator_that_saw_nothing():
    q = quantizer()
    with pytest.raises(RuntimeError, match="TensorQuantizer: Calibrator returned None"):
        q.load_calib_amax()
    q.load_calib_amax(strict=False)
    assert q.amax.isnan()


def test_calibration_collects_what_is_quantized_with_its_prescale():
    q = quantizer()
    q.pre_quant_scale = 2.0
    q.enable_calib()
    q(torch.tensor([1.5]))
    q.load_calib_amax()
    assert q.amax == 3.0


class Two(nn.Module):
    def __init__(self, desc=None):
        super().__init__()
        self.inner = nn.ModuleDict({"a": TensorQuantizer(desc)})

    def forward(self, x):
        return self.inner["a"](x)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_calibration_names_the_quantizer_and_keeps_what_was_collected(bad):
    model = Two()
    q = model.inner["a"]
    q.enable_calib()
    model(torch.tensor([3.0]))
    with pytest.raises(CalibrationError, match=r"^inner\.a: .*(NaN|Inf)"):
        model(torch.tensor([9.0, bad]))
    q.load_calib_amax()
    assert q.amax == 3.0


def test_negative_values_in_the_calibration_of_an_unsigned_quantizer():
    model = Two(QuantDescriptor(unsigned=True))
    model.inner["a"].enable_calib()
    with pytest.raises(CalibrationError, match=r"^inner\.a: .*negative"):
        model(torch.tensor([-1.0]))


def test_an_unsigned_forward_saturates_negative_values():
    assert quantizer(amax=1.0, unsigned=True)(torch.tensor([-0.5])).item() == 0


def test_axis_out_of_range_names_the_quantizer():
    model = Two(QuantDescriptor(axis=3))
    with pytest.raises(ValueError, match=r"^inner\.a: axis 3 is out of range"):
        model(torch.randn(2, 2))


def test_a_batch_on_another_device_names_the_quantizer_and_both():
    model = Two(QuantDescriptor(amax=1.0))
    with pytest.raises(RuntimeError, match=r"inner\.a: the input is on meta, amax on cpu"):
        model(torch.randn(2, device="meta"))


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_bad_amax(bad):
    q = quantizer(amax=1.0)
    with pytest.raises(ValueError, match="amax must be finite and >= 0"):
        q.amax = bad
    assert q.amax == 1.0


def test_amax_that_does_not_fit_the_axis():
    with pytest.raises(ValueError, match=r"shape \(3,\) does not fit axis=None"):
        quantizer().amax = torch.ones(3)
    with pytest.raises(ValueError, match=r"shape \(1, 3\) does not fit axis=0"):
        quantizer(axis=0).amax = torch.ones(1, 3)


def test_amax_surgery():
    q = quantizer(axis=0)
    q._amax = torch.rand(4, 1)
    assert "_amax" in q.state_dict()
    q._amax.data.clamp_(min=0.5)
    q._amax = torch.tensor(2.0)
    x = torch.randn(4, 3)
    np.testing.assert_array_equal(q(x), reference.fake_quant(x.numpy(), 2.0))
    del q._amax
    assert q.amax is None and "_amax" not in q.state_dict()
    q.amax = 1.0
    q.amax = None
    assert not hasattr(q, "_amax")


def test_sharing_a_quantizer_between_layers():
    a, b = quant_nn.QuantLinear(2, 2), quant_nn.QuantLinear(2, 2)
    b._input_quantizer = a._input_quantizer
    a._input_quantizer.amax = 4.0
    assert b._input_quantizer.amax == 4.0


@pytest.mark.parametrize("axis", [None, 0])
def test_state_dict_loads_into_a_quantizer_that_is_not_calibrated(axis):
    q = quantizer(axis=axis)
    q.amax = torch.rand(()) if axis is None else torch.rand(4, 1, 1)
    fresh = quantizer(axis=axis)
    fresh.load_state_dict(q.state_dict())
    assert torch.equal(fresh.amax, q.amax)
    again = quantizer(axis=axis)
    again.amax = torch.zeros_like(q.amax)
    again.load_state_dict(q.state_dict())
    assert torch.equal(again.amax, q.amax)


def test_one_element_shapes_load():
    q = quantizer(amax=1.0)
    q.load_state_dict({"_amax": torch.tensor([3.0])})
    assert q.amax == 3.0


@pytest.mark.parametrize(
    ("axis", "here", "there", "message"),
    [
        (0, (4, 1), (8, 1), r"inner\.a\._amax.*\(8, 1\).*\(4, 1\)"),
        (0, None, (1, 8), r"inner\.a\._amax.*\(1, 8\).*axis=0"),
        (None, None, (8, 1), r"inner\.a\._amax.*\(8, 1\).*axis=None"),
        (None, (), (8, 1), r"inner\.a\._amax.*\(8, 1\).*\(\)"),
    ],
)
def test_a_checkpoint_of_another_shape_names_the_key_and_both_shapes(axis, here, there, message):
    model = Two(QuantDescriptor(axis=axis))
    if here is not None:
        model.inner["a"].amax = torch.ones(here)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({"inner.a._amax": torch.ones(there)})
    if here is not None:
        assert torch.equal(model.inner["a"].amax, torch.ones(here))


def test_a_checkpoint_with_a_negative_amax_is_refused():
    with pytest.raises(RuntimeError, match=r"inner\.a\._amax: amax must be >= 0"):
        Two().load_state_dict({"inner.a._amax": torch.tensor(-1.0)})


def test_unexpected_keys_are_still_reported():
    with pytest.raises(RuntimeError, match="Unexpected"):
        Two().load_state_dict({"inner.a.nonsense": torch.tensor(1.0)})


def test_copy_pickle_and_save():
    q = quantizer(axis=0, num_bits=4)
    q.amax = torch.rand(4, 1)
    x = torch.randn(4, 3)
    stream = io.BytesIO()
    torch.save(q, stream)
    stream.seek(0)
    for twin in (
        copy.deepcopy(q),
        pickle.loads(pickle.dumps(q)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(twin(x), q(x))
        assert repr(twin) == repr(q)


def test_amax_stays_float32_in_a_half_model():
    q = quantizer(amax=0.1234567)
    before = q.amax.clone()
    q.half()
    assert q.amax.dtype == torch.float32 and torch.equal(q.amax, before)
    assert q(torch.randn(4).half()).dtype == torch.float16


def test_a_loaded_amax_goes_where_the_module_is():
    q = quantizer().to("meta")
    q.load_state_dict({"_amax": torch.tensor(1.0, device="meta")})
    assert q.amax.device.type == "meta"


def test_amax_made_in_inference_mode_can_be_changed_later():
    q = quantizer()
    with torch.inference_mode():
        q.enable_calib()
        q(torch.randn(4))
        q.load_calib_amax()
    q.amax = 3.0
    q(torch.randn(4, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"amax": 2.64}, "8bit fake per-tensor amax=2.6400 calibrator=MaxCalibrator quant"),
        ({}, "8bit fake per-tensor amax=uncalibrated calibrator=MaxCalibrator quant"),
        (
            {"num_bits": 4, "axis": 0, "unsigned": True, "calib_method": "histogram"},
            "unsigned 4bit fake axis=0 amax=uncalibrated calibrator=HistogramCalibrator quant",
        ),
        (
            {"axis": 0, "amax": [[1.0], [2.0]], "narrow_range": True},
            "8bit narrow fake axis=0 amax=[1.0000, 2.0000](2) calibrator=MaxCalibrator quant",
        ),
        ({"num_bits": (4, 3), "amax": 1.0}, "E4M3 fake per-tensor amax=1.0000 calibrator="),
    ],
)
def test_repr(fields, text):
    assert text in repr(quantizer(**fields))


def test_repr_of_a_disabled_quantizer():
    assert repr(TensorQuantizer(disabled=True)) == "TensorQuantizer(disabled)"


@pytest.mark.parametrize("axis", [None, 0])
def test_torchs_own_fake_quantize(axis):
    q = quantizer(axis=axis)
    x = torch.randn(4, 5)
    q.amax = reference.amax_of(x.numpy(), axis) * np.float32(0.8)
    ours = q(x)
    q.use_fb_fake_quant = True
    step = q.step_size.expand(4, 5) if axis is not None else q.step_size
    # It multiplies by the inverse scale: ties may fall one step apart.
    assert ((q(x) - ours).abs() <= step * 1.001).all()
    assert not TensorQuantizer.use_fb_fake_quant
    traced = torch.jit.trace(q, x) if axis is None else None
    if traced is not None:
        assert "fake_quantize_per_tensor_affine" in str(traced.graph)


def test_torchs_own_fake_quantize_of_a_zero_range():
    q = quantizer(amax=0.0)
    q.use_fb_fake_quant = True
    assert not q(torch.zeros(3)).isnan().any()


@pytest.mark.parametrize("mode", [{}, {"dynamic": True}])
def test_compiles_without_graph_breaks(mode):
    q = quantizer() if mode else quantizer(amax=1.0)
    x = torch.randn(4, 3)
    compiled = torch.compile(q, fullgraph=True, backend="aot_eager", **mode)
    assert torch.equal(compiled(x), q(x))


def test_autocast_keeps_the_scale_in_float32():
    q = quantizer(amax=0.1234567)
    x = (torch.randn(1000) * 0.1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = q(x)
    expected = reference.fake_quant(x.float().numpy(), 0.1234567)
    assert torch.equal(inside, torch.from_numpy(expected).bfloat16())
    assert not torch.equal(q(x), inside)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moves_to_the_device_and_agrees_with_the_cpu():
    q = quantizer(axis=0)
    q.amax = torch.rand(4, 1) + 0.5
    x = torch.randn(4, 1000)
    expected = q(x)
    assert torch.equal(q.cuda()(x.cuda()).cpu(), expected)


def test_plain_lists_lie_along_the_kept_axis():
    x = torch.randn(3, 3)
    expected = reference.fake_quant(x.numpy(), np.float32([[0.1], [0.2], [0.3]]))
    np.testing.assert_array_equal(quantizer(axis=0, amax=[0.1, 0.2, 0.3])(x), expected)
    q = quantizer(axis=0)
    q.amax = [0.1, 0.2, 0.3]
    np.testing.assert_array_equal(q(x), expected)
    with pytest.raises(ValueError, match=r"shape \(1, 3\) does not fit axis=0"):
        quantizer(axis=0, amax=[[1.0, 2.0, 3.0]])


def test_amax_of_another_size_or_rank_names_both_shapes():
    model = Two(QuantDescriptor(axis=1, amax=[1.0, 2.0, 3.0]))
    both = r"an amax of shape \(3,\) does not fit an input of shape \(4, 2\)"
    with pytest.raises(ValueError, match=rf"inner\.a: {both}"):
        model(torch.randn(4, 2))
    q = quantizer()
    q._amax = torch.rand(3, 1)
    with pytest.raises(ValueError, match="does not fit an input"):
        q(torch.randn(2, 3, 4))


def test_the_device_of_a_loaded_pickle_is_where_its_tensors_are():
    stream = io.BytesIO()
    torch.save(quantizer(axis=0), stream)
    stream.seek(0)
    q = torch.load(stream, map_location="meta", weights_only=False)
    assert q.buffer_device.type == "meta" and "_place" not in q.state_dict()


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [("num_bits", 4, True), ("axis", 0, False), ("unsigned", True, False)],
)
def test_changing_a_field_reaches_the_calibrator(field, value, kept):
    q = TensorQuantizer(QuantDescriptor(calib_method="histogram"))
    q.enable_calib()
    q(torch.randn(1000).abs().reshape(10, 100))
    setattr(q, field, value)
    assert getattr(q.calibrator, f"_{field}") == value
    assert (q.calibrator.compute_amax("max") is not None) is kept


def test_the_statistics_answer_for_other_bits():
    x = torch.randn(20_000)
    amax = []
    for late in (False, True):
        q = TensorQuantizer(QuantDescriptor(8 if late else 4, calib_method="histogram"))
        q.enable_calib()
        q(x)
        q.num_bits = 4
        q.load_calib_amax("mse")
        amax.append(q.amax.item())
    assert amax[0] == amax[1] < 4


def test_a_learned_range_is_what_amax_and_scale_say():
    q = quantizer(learn_amax=True, amax=2.0, scale_amax=0.5)
    assert q.amax == 1.0 and q.scale == torch.tensor(1.0) / 127
    with torch.no_grad():
        q.clip.clip_value_max.fill_(5.0)
    assert q.amax == 5.0 and "amax=5.0000" in repr(q)


def test_assigning_amax_in_every_form():
    q = quantizer()
    q._amax = None
    q._amax = torch.tensor(1.0)
    q._amax = 2.0
    assert q(torch.tensor([3.0])).item() == 2.0 and "_amax" in q.state_dict()


def test_names_of_descriptors_in_messages():
    with pytest.raises(ValueError, match="stem: amax must be finite"):
        quantizer(name="stem").amax = -1


def test_constructor_mistakes():
    with pytest.raises(TypeError, match="takes a QuantDescriptor, got"):
        TensorQuantizer({"num_bits": 8})
    with pytest.raises(RuntimeError, match="clipping needs a learned range"):
        TensorQuantizer(QuantDescriptor(), if_clip=True)


def test_a_half_checkpoint_leaves_amax_in_float32():
    q = quantizer(amax=1.0)
    q.load_state_dict({"_amax": torch.tensor(2.0, dtype=torch.float16)}, assign=True)
    assert q.amax == 2.0 and q.amax.dtype == torch.float32


@pytest.mark.parametrize("learned", [False, True])
def test_a_dtype_that_cannot_be_quantized_names_the_quantizer(learned):
    model = nn.Sequential(TensorQuantizer(QuantDescriptor()))
    model[0].amax = 1.0
    if learned:
        model[0].learn_range("lsq", weight=False)
    told = "^0: quantization takes float32, .*, got torch.int32; convert it before"
    with pytest.raises(TypeError, match=told):
        model(torch.ones(3, dtype=torch.int32))
