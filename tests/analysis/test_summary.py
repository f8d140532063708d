import json

import pytest
import torch
from analysis_models import calibrated, trained
from torch import nn

from pytorch_quant import QuantDescriptor, TensorQuantizer, quantize
from pytorch_quant.analysis import summary
from pytorch_quant.nn import QuantLinear


def test_rows_and_totals_of_a_placed_model():
    model, training, _ = trained()
    quantized = calibrated(model, [training[0]], {"squeeze": "FP8", "stem": "INT8", "head": None})
    quantized.expand._weight_quantizer.disable()
    quantized.block.second._input_quantizer.amax = None
    found = summary(quantized)
    rows = {(row.layer, row.operand): row for row in found.rows}
    weight = rows["block.first", "weight"]
    amax = model.block.first.weight.detach().abs().amax((1, 2, 3))
    assert weight.amax == pytest.approx((float(amax.min()), float(amax.max())))
    assert (weight.format, weight.axis, weight.amax_count) == ("int8", 0, 16)
    assert rows["squeeze", "input"].format == rows["squeeze", "weight"].format == "e4m3"
    assert rows["squeeze", "weight"].axis is None and rows["squeeze", "weight"].amax_count == 1
    add, first = rows["block/add#0", "input1"], rows["block.first", "input"]
    assert {add.shared_with, first.shared_with} == {
        None,
        (first if add.shared_with else add).quantizer,
    }
    assert add.amax == first.amax and add.kind == "add"
    assert rows["expand", "weight"].state == "disabled"
    assert rows["block.second", "input"].state == "uncalibrated"
    assert rows["head", "-"].state == "float" and rows["head", "-"].quantizer is None
    assert found.quantizers == 10 and found.shared == 1 and found.disabled == 1
    assert found.uncalibrated == ["block.second._input_quantizer"]
    assert found.quantized_layers == 6 and found.float_layers == 1
    assert found.parameters == sum(p.numel() for p in model.parameters())
    seen = (model.stem, model.block.first, model.block.second, model.squeeze)
    assert found.quantized_weights == sum(layer.weight.numel() for layer in seen)
    text = str(found)
    assert "6 quantized and 1 float layers; 10 quantizers, 1 shared, 1 off, 1 uncalibrated" in text
    assert json.loads(found.to_json())["rows"][0]["layer"] == "stem"


def test_states_of_quantizers_and_models_without_any():
    model = nn.Sequential(
        QuantLinear(
            8,
            8,
            quant_desc_input=QuantDescriptor(8, dynamic=True),
            quant_desc_weight=QuantDescriptor(4, axis=1, block_size=4),
        ),
        TensorQuantizer(QuantDescriptor(8, learn_amax=True, amax=2.0)),
        TensorQuantizer(QuantDescriptor(6, amax=1.5, unsigned=True)),
        TensorQuantizer(QuantDescriptor(8), if_quant=False),
        TensorQuantizer(QuantDescriptor(8), if_calib=True),
    )
    rows = summary(model).rows
    assert [row.state for row in rows] == [
        "at run time",
        "uncalibrated",
        "learned",
        "fixed",
        "off",
        "collects",
    ]
    assert [row.layer for row in rows] == ["0", "0", "1", "2", "3", "4"]
    assert rows[1].block_size == 4 and rows[3].format == "uint6" and rows[3].amax == (1.5, 1.5)
    assert "1 x4" in str(summary(model))
    plain = summary(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert [row.layer for row in plain.rows] == ["0"] and plain.quantizers == 0
    assert "0 quantized and 1 float layers" in str(plain)
    assert str(summary(nn.ReLU())).endswith("0 parameters, 0.0% of them quantized weights")


def test_one_layer_recurrent_layers_and_wrong_use():
    layer = quantize(nn.Linear(64, 64), {"": "INT8"}, example_inputs=torch.randn(2, 64))
    assert [row.layer for row in summary(layer).rows] == ["", ""]
    assert "(model)" in str(summary(layer))
    lstm = quantize(nn.Sequential(nn.LSTM(8, 8, 2)), {"0": "INT8"}, placement="none")
    rows = summary(lstm).rows
    assert {row.layer for row in rows} == {"0"} and rows[0].kind == "LSTM"
    assert "0._input_quantizers.0" in {row.quantizer for row in rows}
    assert [row.operand for row in rows] == ["input 0", "input 1", "weight 0", "weight 1"]
    with pytest.raises(TypeError, match="takes a module, got str"):
        summary("model")
    with pytest.raises(ValueError, match="is a TensorQuantizer"):
        summary(TensorQuantizer())


def test_a_range_of_nan_is_none():
    model, training, _ = trained()
    quantized = calibrated(model, [training[0]])
    quantized.expand._input_quantizer.amax.fill_(float("nan"))
    found = summary(quantized)
    rows = {(row.layer, row.operand): row for row in found.rows}
    assert rows["expand", "input"].state == "uncalibrated"
    assert found.uncalibrated == ["expand._input_quantizer"]


def test_weights_of_recurrent_layers_count():
    model = nn.ModuleList(nn.LSTM(8, 16, 2) for _ in range(6))
    quantized = quantize(model, {nn.LSTM: "INT8"}, placement="none")
    # The weight that a recurrent quantizer sees is made anew, where the last one was in memory.
    assert summary(quantized).quantized_weights == 6 * (64 * (8 + 16) + 64 * (16 + 16))
