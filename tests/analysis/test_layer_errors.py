import copy
import json
import math

import numpy as np
import pytest
import torch
from analysis_models import assert_same_state, calibrated, state_of, trained
from reference import fake_quant
from torch import nn

from pytorch_quant import QuantDescriptor, TensorQuantizer, cached_weights, calibrate, quantize
from pytorch_quant.analysis import layer_errors
from pytorch_quant.analysis.plain_data import shown_db
from pytorch_quant.nn import QuantLinear
from pytorch_quant.nn.modes import named_quantizers


def sqnr(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return 10 * np.log10((x**2).sum() / ((y - x) ** 2).sum())


def two_layers(amax=1.5, bits=4):
    model = nn.Sequential(
        QuantLinear(
            5,
            7,
            quant_desc_input=QuantDescriptor(bits, amax=amax),
            quant_desc_weight=QuantDescriptor(bits, axis=0),
        ),
        nn.ReLU(),
        QuantLinear(
            7,
            3,
            quant_desc_input=QuantDescriptor(bits, amax=0.4, unsigned=True),
            quant_desc_weight=QuantDescriptor(bits, axis=0),
        ),
    )
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = -1
    batches = [torch.randn(6, 5) for _ in range(3)]
    calibrate(model, batches, progress=False)
    return model, batches


def numpy_run(model, x, on):
    """Both layers in NumPy, those of `on` quantized."""
    tensors = []
    for index in (0, 2):
        layer = model[index]
        w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        unsigned = index == 2
        q = layer._input_quantizer
        xq = fake_quant(x, float(q.amax), bits=4, unsigned=unsigned)
        wq = np.stack([fake_quant(row, np.abs(row).max(), bits=4) for row in w])
        tensors += [(x, xq), (w, wq)]
        x = (xq @ wq.T if index in on else x @ w.T) + b
        if index == 0:
            x = np.maximum(x, 0)
    return x, tensors


def test_figures_equal_numpy_on_the_formula():
    model, batches = two_layers()
    report = layer_errors(model, batches, progress=False)
    x = torch.cat(batches).numpy().astype(np.float64)
    real, tensors = numpy_run(model, x, ())
    rows = {row.name: row for row in report.quantizers}
    names = [f"{i}._{kind}_quantizer" for i in (0, 2) for kind in ("input", "weight")]
    assert list(rows) == names
    for name, (before, after) in zip(names, tensors, strict=True):
        row, quantizer = rows[name], model.get_submodule(name)
        assert row.sqnr_db == pytest.approx(sqnr(before, after), abs=1e-3)
        assert row.values == before.size
        amax = quantizer.amax.numpy()
        assert row.clipped == pytest.approx(np.mean(np.abs(before) > amax.astype(np.float64)))
        step = np.where(amax > 0, amax, 1) / (15 if quantizer.unsigned else 7)
        codes = np.round(after / step).astype(int)
        assert row.codes_used == pytest.approx(len(np.unique(codes)) / 16)
        dead = (codes == 0).all(axis=1 if "weight" in name else 0)
        assert (row.dead_channels, row.channels) == (dead.sum(), dead.size)
    assert rows["0._weight_quantizer"].dead_channels == 1
    assert rows["2._input_quantizer"].dead_channels >= 1
    assert rows["0._input_quantizer"].clipped > 0
    expected = {0: ((0,), (2,)), 2: ((2,), (0,))}
    for row in report.layers:
        only, rest = expected[int(row.name)]
        assert row.kind == "Linear"
        assert row.only_db == pytest.approx(sqnr(real, numpy_run(model, x, only)[0]), abs=1e-3)
        assert row.without_db == pytest.approx(sqnr(real, numpy_run(model, x, rest)[0]), abs=1e-3)
        before, after = tensors[1 if row.name == "0" else 3]
        error = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert row.weight_error == pytest.approx(error, abs=1e-5)
    both = numpy_run(model, x, (0, 2))[0]
    assert report.output_db == pytest.approx(sqnr(real, both), abs=1e-3)
    assert report.batches == 3


def test_digits_with_shared_quantizers_and_call_sites():
    model, training, _ = trained()
    batches = [training[0], training[1]]
    quantized = calibrated(model, batches, {"head": "INT8", "stem": "INT8"})
    add = quantized.block._call_quantizers["add_0_input1"]
    assert add is quantized.block.first._input_quantizer
    before = state_of(quantized)
    report = layer_errors(quantized, iter(batches), progress=False)
    assert_same_state(before, state_of(quantized))
    rows = {row.name: row for row in report.layers}
    assert rows["block/add#0"].kind == "add" and rows["block/add#0"].weight_error is None
    # Only the add: computed with the float model and the amax of the shared quantizer.
    x = torch.cat([image for image, _ in batches])
    with torch.no_grad():
        y = torch.relu(model.stem(x))
        identity = torch.from_numpy(fake_quant(y.numpy(), float(add.amax))).float()
        residual = model.block.second(torch.relu(model.block.first(y)))
        z = torch.relu(residual + identity)
        z = torch.relu(model.expand(torch.relu(model.squeeze(z))))
        wanted = sqnr(model(x), model.head(z.mean((2, 3))))
    assert rows["block/add#0"].only_db == pytest.approx(wanted, abs=0.01)
    shared = [r for r in report.quantizers if r.name.endswith("add_0_input1")]
    own = [r for r in report.quantizers if r.name == "block.first._input_quantizer"]
    # One row for the quantizer, which saw the tensor twice.
    assert len(shared) + len(own) == 1
    assert (shared + own)[0].values == 2 * y.numel()


@pytest.mark.parametrize("bits", [(4, 3), (2, 1), 8, 16])
def test_share_of_codes_of_every_format(bits):
    desc = QuantDescriptor(bits, amax=1.0)
    model = nn.Sequential(TensorQuantizer(desc), nn.Identity())
    x = torch.cat([torch.linspace(-1, 1, 200001), torch.linspace(-0.1, 0.1, 100001)])[:, None]
    row = layer_errors(model, [x], progress=False).quantizers[0]
    grid = {(4, 3): 253, (2, 1): 15, 8: 256, 16: 65536}[bits]
    lowest_missing = isinstance(bits, int)
    assert row.codes_used == pytest.approx((grid - lowest_missing) / grid)
    assert row.name == "0"


def test_blocks_dynamic_and_half_precision():
    block = QuantDescriptor(4, axis=1, block_size=4)
    model = nn.Sequential(
        QuantLinear(
            8, 6, quant_desc_input=QuantDescriptor(8, dynamic=True), quant_desc_weight=block
        )
    )
    batches = [torch.randn(5, 8)]
    calibrate(model, batches, progress=False)
    x, w = layer_errors(model, batches, progress=False).quantizers
    assert x.format == "uint8 dynamic" and x.clipped == 0 and x.sqnr_db > 35
    rows = model[0].weight.detach().numpy().reshape(-1, 4)
    blocks = np.stack([fake_quant(r, np.abs(r).max(), bits=4) for r in rows])
    assert w.sqnr_db == pytest.approx(sqnr(rows, blocks), abs=1e-3)
    half = copy.deepcopy(model).bfloat16()
    report = layer_errors(half, [batches[0].bfloat16()], progress=False)
    assert math.isfinite(report.output_db)


def test_model_comes_back_also_after_an_error():
    model, batches = two_layers()
    model.train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[2]._input_quantizer.disable()
    model[0]._input_quantizer.enable_calib()
    before = state_of(model)
    report = layer_errors(model, batches, progress=False)
    assert_same_state(before, state_of(model))
    assert "2._input_quantizer" not in [row.name for row in report.quantizers]

    def fails(model, batch):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        layer_errors(model, batches, forward=fails, progress=False)
    assert_same_state(before, state_of(model))


def test_quantizers_alone_take_one_pass_and_inputs_may_be_written_to():
    model, batches = two_layers()
    runs = []

    def forward(model, batch):
        runs.append(batch.clone())
        out = model(batch)
        batch.zero_()
        return {"out": (out, 3)}

    report = layer_errors(model, batches, forward=forward, layers=False, progress=False)
    assert len(runs) == 3 and not report.layers and math.isnan(report.output_db)
    runs.clear()
    whole = layer_errors(model, batches, forward=forward, progress=False)
    assert len(runs) == 3 * 6 and all(
        torch.equal(run, batches[i // 6]) for i, run in enumerate(runs)
    )
    assert whole.quantizers == report.quantizers
    assert whole.layers == layer_errors(model, batches, progress=False).layers


def test_inside_of_cached_weights_the_figures_are_the_same():
    model, batches = two_layers()
    model.eval()
    report = layer_errors(model, batches, progress=False)
    with torch.no_grad(), cached_weights(model):
        before = model(batches[0])
        assert layer_errors(model, batches, progress=False) == report
        assert torch.equal(model(batches[0]), before)


def test_shown_as_tables_and_json():
    model, batches = two_layers()
    report = layer_errors(model, batches, progress=False)
    text = str(report)
    assert "only it, dB" in text and "2._weight_quantizer" in text and "1 of 7" in text
    plain = json.loads(report.to_json())
    assert plain["layers"][0]["name"] == "0"
    assert plain["output_db"] == report.output_db
    for quantizer in named_quantizers(model).values():
        quantizer.disable()
    model[0]._input_quantizer.enable()
    model[0]._input_quantizer.amax = 1e-30
    plain = json.loads(layer_errors(model, [torch.zeros(2, 5)], progress=False).to_json())
    assert plain["quantizers"][0]["sqnr_db"] is None


def test_wrong_use_is_refused():
    model, batches = two_layers()
    with pytest.raises(ValueError, match=r"no TensorQuantizer.*quantize"):
        layer_errors(nn.Linear(2, 2), batches)
    with pytest.raises(ValueError, match="no batches"):
        layer_errors(model, [], progress=False)
    with pytest.raises(TypeError, match="one tensor of shape"):
        layer_errors(model, batches[0])
    with pytest.raises(TypeError, match="layer_errors takes a module, got str"):
        layer_errors("model.pt", batches)
    with pytest.raises(ValueError, match="no floating-point tensor"):
        layer_errors(model, batches, forward=lambda m, b: m(b).argmax(1), progress=False)
    fresh = quantize(
        nn.Sequential(nn.Linear(64, 64)), example_inputs=torch.randn(2, 64), placement="none"
    )
    with pytest.raises(RuntimeError, match=r"2 uncalibrated .*0\._input_quantizer, 0\._weight"):
        layer_errors(fresh, [torch.randn(2, 64)])
    for quantizer in named_quantizers(model).values():
        quantizer.disable()
    with pytest.raises(ValueError, match="every quantizer of the model is disabled"):
        layer_errors(model, batches)


def test_progress_counts_runs(capsys):
    model, batches = two_layers()
    layer_errors(model, batches)
    assert "18/18" in capsys.readouterr().err
    layer_errors(model, batches, progress=False)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("dynamic", [False, True])
def test_nan_names_the_quantizer_and_the_batch(dynamic):
    model, batches = two_layers()
    if dynamic:
        model[0]._input_quantizer = TensorQuantizer(QuantDescriptor(8, dynamic=True))
    batches[1][2, 3] = math.nan
    before = state_of(model)
    told = r"batch 1: 0\._input_quantizer: NaN .*in 1 of 30 values"
    with pytest.raises(ValueError, match=told):
        layer_errors(model, batches, progress=False)
    assert_same_state(before, state_of(model))
    model[0]._input_quantizer.disable()
    with pytest.raises(ValueError, match=r"batch 1: 2\._input_quantizer: NaN"):
        layer_errors(model, batches, layers=False, progress=False)
    model[2]._input_quantizer.disable()
    with pytest.raises(ValueError, match="batch 1: in float the model returns NaN in 3 of 18"):
        layer_errors(model, batches, progress=False)
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"2\._weight_quantizer: NaN in 1 of 21 values"):
        layer_errors(model, batches[:1], progress=False)


def test_infinity_is_clipped_and_a_mask_in_the_output_does_not_count():
    model = nn.Sequential(TensorQuantizer(QuantDescriptor(8, amax=1.0)))
    x = torch.tensor([[0.5, -0.25, -math.inf, 0.8]])
    report = layer_errors(model, [x], progress=False)
    assert report.quantizers[0].clipped == 0.25
    real = np.array([0.5, -0.25, 0.8], np.float32)
    assert report.output_db == pytest.approx(sqnr(real, fake_quant(real, 1.0)), abs=1e-3)
    with pytest.raises(ValueError, match="returned no finite value"):
        layer_errors(model, [x[:, 2:3]], progress=False)


def test_batches_without_samples():
    model, batches = two_layers()
    empty = batches[0][:0]
    with pytest.raises(ValueError, match=r"no finite value.*no samples"):
        layer_errors(model, [empty], progress=False)
    assert (
        layer_errors(model, [empty, *batches], progress=False).layers
        == layer_errors(model, batches, progress=False).layers
    )
    row = layer_errors(model, [empty], layers=False, progress=False).quantizers[0]
    assert row.values == 0 and row.channels is None and row.dead_channels is None


def test_a_clip_that_is_learned_counts_what_it_changes():
    x = torch.linspace(-2, 2, 401)[:, None]
    both = TensorQuantizer(QuantDescriptor(8, learn_amax=True, amax=1.0))
    both.clip.clip_value_min.data.fill_(-0.5)
    alone = TensorQuantizer(QuantDescriptor(8, learn_amax=True, amax=1.0), if_quant=False)
    rows = layer_errors(nn.Sequential(both), [x], progress=False).quantizers
    changed = (x < -0.5) | (x > 1)
    assert rows[0].clipped == pytest.approx(float(changed.float().mean()))
    rows = layer_errors(nn.Sequential(alone), [x], progress=False).quantizers
    assert rows[0].clipped == pytest.approx(float((x.abs() > 1).float().mean()))


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = QuantLinear(32, 16)

    def forward(self, x):
        return self.layer(nn.functional.dropout(x, 0.5, training=True))


def test_what_a_model_draws_is_no_error_of_quantization():
    model, x = Draws(), torch.randn(64, 32)
    calibrate(model, [x, 2 * x], progress=False)
    seen = []

    def forward(model, batch):
        seen.append(float(batch[0, 0]))
        return model(batch)

    fresh = (torch.randn(64, 32) for _ in range(2))
    report = layer_errors(model, fresh, forward=forward, progress=False)
    # One layer of int8: 6 dB for each bit.
    assert report.output_db > 30 and report.layers[0].only_db == report.output_db
    # Batches that are drawn meanwhile still differ.
    assert len(set(seen)) == 2


def test_sentences_for_ratios_without_error():
    model = nn.Sequential(TensorQuantizer(QuantDescriptor(8, amax=127.0)))
    report = layer_errors(model, [torch.arange(5.0)[:, None]], progress=False)
    assert str(report).endswith("output with all quantized: exact")
    assert shown_db(-0.04) == "0.0" and shown_db(-0.06) == "-0.1"
