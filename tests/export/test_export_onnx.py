import numpy as np
import onnx
import onnx_runs
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from pytorch_quant import QuantDescriptor, calibrate, export_onnx, quant_modules
from pytorch_quant import nn as quant_nn
from pytorch_quant.nn.modes import named_quantizers


def network(channels=32):
    with quant_modules.initialize():
        return nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, groups=2),
            nn.ConvTranspose2d(channels, 6, 2, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 5),
        ).eval()


@pytest.fixture
def calibrated():
    model, x = network(), torch.randn(2, 3, 8, 8)
    calibrate(model, [x], progress=False)
    return model, x


@pytest.mark.parametrize("weights", ["int8", "float"])
@pytest.mark.parametrize("optimize", [True, False])
def test_runs_as_it_was_simulated(tmp_path, calibrated, weights, optimize):
    model, x = calibrated
    export_onnx(model, x, tmp_path / "m.onnx", weights=weights)
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy(), optimize=optimize)
    # One flipped code of the last input is worth a step of the output.
    tolerance = 5e-3 if optimize else 1e-6
    np.testing.assert_allclose(got, model(x).detach(), atol=tolerance)


def test_integer_weights_are_the_codes_of_the_simulation(tmp_path, calibrated):
    model, x = calibrated
    report = export_onnx(model, x, tmp_path / "m.onnx")
    file = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(file, full_check=True)
    values = {c.name: c for c in file.graph.initializer}
    weights = 0
    for node in file.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in values:
            continue
        weights += 1
        index = node.name.split(".")[0]
        layer = model[int(index)]
        codes = values[node.input[0]]
        assert codes.data_type == TensorProto.INT8
        scale = numpy_helper.to_array(values[node.input[1]])
        axis = next(a.i for a in node.attribute if a.name == "axis")
        assert axis == layer._weight_quantizer.axis
        shape = [-1 if a == axis else 1 for a in range(layer.weight.dim())]
        product = numpy_helper.to_array(codes).astype(np.float32) * scale.reshape(shape)
        np.testing.assert_array_equal(product, layer._weight_quantizer(layer.weight).detach())
    kinds = [n.op_type for n in file.graph.node]
    assert weights == report.integer_weights == 4
    assert report.quantize_nodes == kinds.count("QuantizeLinear") == 5
    assert report.dequantize_nodes == kinds.count("DequantizeLinear") == 9
    assert report.size == (tmp_path / "m.onnx").stat().st_size
    assert report.float_quantizers == []
    assert (report.quantized_layers, report.weight_only_layers, report.float_layers) == (4, 0, ())
    assert "5 Q, 9 DQ, 4 integer weights; 4 quantized layers" in str(report)
    assert len(str(report).splitlines()) == 2
    assert not any(c.data_type == TensorProto.FLOAT and len(c.dims) > 1 for c in values.values())


def test_names_say_whose_scale_it_is(tmp_path, calibrated):
    model, x = calibrated
    export_onnx(model, x, tmp_path / "m.onnx", input_names=["image"], output_names=["logits"])
    graph = onnx.load(tmp_path / "m.onnx").graph
    names = {c.name for c in graph.initializer}
    assert {"0._input_quantizer.scale", "0._weight_quantizer.scale"} <= names
    assert "0._input_quantizer/QuantizeLinear" in {n.name for n in graph.node}
    assert graph.input[0].name == "image" and graph.output[0].name == "logits"
    assert not any(n.metadata_props for n in graph.node)


def test_the_file_is_about_a_quarter(tmp_path):
    model, x = network(256), torch.randn(1, 3, 8, 8)
    calibrate(model, [x], progress=False)
    small = export_onnx(model, x, tmp_path / "int8.onnx").size
    large = export_onnx(model, x, tmp_path / "float.onnx", weights="float").size
    assert 0.25 < small / large < 0.28


@pytest.mark.parametrize(
    "fields", [{"num_bits": 4}, {"num_bits": (4, 3)}, {"narrow_range": True}, {}], ids=str
)
def test_weights_of_every_format(tmp_path, fields):
    desc = QuantDescriptor(axis=0, **fields)
    model = nn.Sequential(quant_nn.QuantLinear(16, 8, quant_desc_weight=desc))
    x = torch.randn(4, 16)
    calibrate(model, [x], progress=False)
    with torch.no_grad():
        model[0].weight.mul_(1.7)
        model[0].weight[3] = 0
    model[0]._weight_quantizer._amax[3] = 0
    report = export_onnx(model, x, tmp_path / "m.onnx")
    assert report.integer_weights == 1 and report.quantize_nodes == 1
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(got, model(x).detach(), atol=2e-6)


def test_a_shared_weight_is_stored_once_for_each_scale(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = quant_nn.QuantLinear(8, 8)
            self.b = quant_nn.QuantLinear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x)) @ self.a.weight

    model, x = Tied(), torch.randn(2, 8)
    calibrate(model, [x], progress=False)
    export_onnx(model, x, tmp_path / "m.onnx")
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(got, model(x).detach(), atol=1e-6)


def test_a_disabled_quantizer_is_float_and_listed(tmp_path, calibrated):
    model, x = calibrated
    for q in (model[6]._input_quantizer, model[6]._weight_quantizer):
        q.disable()
    report = export_onnx(model, x, tmp_path / "m.onnx")
    assert report.float_quantizers == ["6._input_quantizer", "6._weight_quantizer"]
    assert report.quantized_layers == 3 and report.float_layers == ("6/Gemm",)
    assert "1 float layer: 6/Gemm" in str(report)
    assert "disabled quantizers: 6._input_quantizer, 6._weight_quantizer" in str(report)
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(got, model(x).detach(), atol=1e-6)


def test_a_float_model_exports_too(tmp_path):
    report = export_onnx(nn.Linear(4, 4), torch.randn(2, 4), tmp_path / "m.onnx")
    assert (report.quantize_nodes, report.integer_weights) == (0, 0)


def test_the_model_comes_back_as_it_was(tmp_path, calibrated):
    model, x = calibrated
    model.train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export_onnx(model, x, tmp_path / "m.onnx")
    assert model.training and not model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def dead(model):
    model[0]._input_quantizer.amax = 0.0


def nan(model):
    model[0]._input_quantizer.load_calib_amax = None
    model[0]._input_quantizer._amax.fill_(torch.nan)


def wide(model):
    model[6]._weight_quantizer.num_bits = 16


def uncalibrated(model):
    model[0]._input_quantizer.amax = None
    model[6]._weight_quantizer.amax = None


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (dead, ValueError, r"0\._input_quantizer: amax is 0"),
        (nan, ValueError, r"0\._input_quantizer: amax is not finite"),
        (wide, ValueError, r"6\._weight_quantizer: 16-bit codes have no Q/DQ form"),
        (
            uncalibrated,
            RuntimeError,
            r"2 uncalibrated quantizer\(s\): 0\._input_quantizer, 6\._weight_quantizer\. Calib",
        ),
    ],
)
def test_what_cannot_be_exported_is_named_and_the_old_file_stays(
    tmp_path, calibrated, spoil, error, message
):
    model, x = calibrated
    (tmp_path / "m.onnx").write_bytes(b"precious")
    spoil(model)
    with pytest.raises(error, match=message):
        export_onnx(model, x, tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"precious"


def test_paths_that_cannot_be_written(tmp_path, calibrated):
    model, x = calibrated
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        export_onnx(model, x, tmp_path / "no" / "m.onnx")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        export_onnx(model, x, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_fails_leaves_no_file(tmp_path, calibrated):
    model, _ = calibrated
    with pytest.raises(Exception, match=r"torch\.export"):
        export_onnx(model, torch.randn(2, 5, 8, 8), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_unknown_weights(tmp_path, calibrated):
    with pytest.raises(ValueError, match="weights must be one of int8, float, got 'int4'"):
        export_onnx(*calibrated, tmp_path / "m.onnx", weights="int4")


def test_many_channels_and_large_recurrent_weights_are_stored_as_integers(tmp_path):
    model, x = nn.Sequential(quant_nn.QuantLinear(8, 9000)), torch.randn(2, 8)
    calibrate(model, [x], progress=False)
    report = export_onnx(model, x, tmp_path / "wide.onnx")
    kinds = [n.op_type for n in onnx.load(tmp_path / "wide.onnx").graph.node]
    assert report.integer_weights == 1
    assert sorted(set(kinds)) == ["DequantizeLinear", "Gemm", "QuantizeLinear"]
    (got,) = onnx_runs.run(tmp_path / "wide.onnx", x.numpy())
    np.testing.assert_allclose(got, model(x).detach(), atol=1e-6)
    lstm, sequence = quant_nn.QuantLSTM(128, 300), torch.randn(2, 1, 128)
    calibrate(lstm, [sequence], progress=False)
    report = export_onnx(lstm, (sequence,), tmp_path / "lstm.onnx")
    assert report.integer_weights == 1 and report.size < 1.1 * 1200 * 428


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=onnx_runs.needs_half), torch.bfloat16]
)
def test_half_precision_weights(tmp_path, calibrated, dtype):
    model, x = calibrated
    model.to(dtype)
    report = export_onnx(model, x.to(dtype), tmp_path / "m.onnx")
    assert report.integer_weights == 4
    file = onnx.load(tmp_path / "m.onnx")
    kinds = {c.data_type for c in file.graph.initializer if c.name.endswith(".scale")}
    expected = TensorProto.FLOAT16 if dtype == torch.float16 else TensorProto.BFLOAT16
    assert kinds == {expected}
    if dtype == torch.float16:
        (got,) = onnx_runs.run(tmp_path / "m.onnx", x.half().numpy())
        np.testing.assert_allclose(got, model(x.half()).detach(), atol=2e-3)
    with pytest.raises(ValueError, match=r"opset=18 is too low for a model in b?float16"):
        export_onnx(model, x.to(dtype), tmp_path / "m.onnx", opset=18)


def test_an_opset_that_cannot_be_written(tmp_path, calibrated):
    model, x = calibrated
    for opset, message in ((13, "opset=13 is below 18"), (99, "opset=99")):
        with pytest.raises(Exception, match=message):
            export_onnx(model, x, tmp_path / "m.onnx", opset=opset)
    eight = nn.Sequential(quant_nn.QuantLinear(4, 4, quant_desc_input=QuantDescriptor((4, 3))))
    calibrate(eight, [x[:, 0, 0, :4]], progress=False)
    with pytest.raises(ValueError, match="too low for a model in FP8; use opset=19"):
        export_onnx(eight, x[:, 0, 0, :4], tmp_path / "m.onnx", opset=18)
    with pytest.raises(ValueError, match=r"takes no float64; export model.float\(\)"):
        export_onnx(eight.double(), x[:, 0, 0, :4].double(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_every_quantizer_with_a_problem_is_named(tmp_path, calibrated):
    model, x = calibrated
    for index in (0, 2):
        model[index]._weight_quantizer.num_bits = 16
    with pytest.raises(ValueError, match=r"0\._weight_quantizer: 16.*2\._weight_quantizer: 16"):
        export_onnx(model, x, tmp_path / "m.onnx")


class Auxiliary(nn.Module):
    """A head that eval mode does not run."""

    def __init__(self):
        super().__init__()
        self.body, self.head = quant_nn.QuantLinear(4, 4), quant_nn.QuantLinear(4, 3)

    def forward(self, x, scale=1.0):
        y = self.body(x) * scale
        return (y, self.head(y)) if self.training else y


@pytest.mark.parametrize("spoil", ["uncalibrated", "0", "bits"])
def test_quantizers_that_are_not_met_may_be_in_any_state(tmp_path, spoil):
    model, x = Auxiliary(), torch.randn(2, 4)
    with pytest.warns(UserWarning, match="not reached"):
        calibrate(model, [x], progress=False)
    assert not model.head._input_quantizer.calibrated
    if spoil == "0":
        model.head._input_quantizer.amax = 0.0
    elif spoil == "bits":
        model.head._input_quantizer.num_bits = 16
    report = export_onnx(model.train(), (x, {"scale": 2.0}), tmp_path / "m.onnx")
    assert model.training and report.quantize_nodes == 1
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(got, model.eval()(x, 2.0).detach(), atol=1e-5)
    model.body._weight_quantizer.amax = model.body._input_quantizer.amax = None
    told = r"2 uncalibrated quantizer\(s\): body\._input_quantizer, body\._weight_quantizer\. Calib"
    with pytest.raises(RuntimeError, match=told):
        export_onnx(model, x, tmp_path / "m.onnx")


def test_arguments_of_the_wrong_type(tmp_path, calibrated):
    model, x = calibrated
    with pytest.raises(TypeError, match="a tensor or a tuple of arguments, got list"):
        export_onnx(model, [x], tmp_path / "m.onnx")


def test_a_quantizer_left_calibrating_exports(tmp_path, calibrated):
    model, x = calibrated
    model[0]._input_quantizer.enable_calib()
    export_onnx(model, x, tmp_path / "m.onnx")
    assert model[0]._input_quantizer._if_calib


def test_uncalibrated_with_torchs_own_fake_quantize(tmp_path, monkeypatch):
    monkeypatch.setattr(quant_nn.TensorQuantizer, "use_fb_fake_quant", True)
    model, x = nn.Sequential(quant_nn.QuantLinear(4, 4)), torch.randn(2, 4)
    export_onnx(model, x, tmp_path / "m.onnx")
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(got, model(x).detach(), atol=0.02)


@pytest.mark.parametrize("weights", ["int8", "float"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_both_exporters_write_the_same(tmp_path, calibrated, weights):
    model, x = calibrated
    options = {"weights": weights, "input_names": ["image"], "output_names": ["logits"]}
    paths = [tmp_path / "dynamo.onnx", tmp_path / "torchscript.onnx"]
    reports = [export_onnx(model, x, path, dynamo=path is paths[0], **options) for path in paths]
    assert reports[0].opset == reports[1].opset
    held = []
    for path in paths:
        graph = onnx.load(path).graph
        kinds = ("QuantizeLinear", "DequantizeLinear", "Conv", "ConvTranspose", "Gemm")
        values = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
        nodes = {n.name: (n.op_type, list(n.attribute)) for n in graph.node if n.op_type in kinds}
        held.append((values, {name: nodes[name][0] for name in nodes}))
    # The shape that a layer is flattened to has a name of the exporter's own.
    ours = [{n: v for n, v in values.items() if n[0].isdigit()} for values, _ in held]
    assert len(ours[0]) == 26 and set(ours[0]) == set(ours[1]) and held[0][1] == held[1][1]
    for name, value in ours[0].items():
        np.testing.assert_array_equal(value, ours[1][name])
    outputs = [onnx_runs.run(path, x.numpy())[0] for path in paths]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-6)


@pytest.mark.parametrize("shapes", [({0: "n"},), {"x": {0: torch.export.Dim("n")}}, (["n"],)])
def test_dynamic_shapes_by_the_older_exporter(tmp_path, shapes):
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = quant_nn.QuantLinear(4, 4)

        def forward(self, x):
            return self.body(x) * 2

    model, x = Doubled(), torch.randn(2, 4)
    calibrate(model.eval(), [x], progress=False)
    export_onnx(model, x, tmp_path / "m.onnx", dynamic_shapes=shapes, dynamo=False)
    (given,) = onnx.load(tmp_path / "m.onnx").graph.input
    assert given.name == "x" and given.type.tensor_type.shape.dim[0].dim_param == "n"
    x = torch.randn(7, 4)
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(got, model(x).detach(), atol=1e-6)


def eight_bit_float(model):
    model[6]._weight_quantizer.num_bits = (4, 3)


@pytest.mark.parametrize(
    ("change", "opset", "message"),
    [
        (None, 12, "opset=12 is too low for a model in per-channel; use opset=13"),
        (None, 21, "opset=21 is above 20, where the TorchScript exporter"),
        (eight_bit_float, 18, "too low for a model in FP8; use opset=19"),
        (nn.Module.half, 17, "too low for a model in float16; use opset=19"),
        (nn.Module.bfloat16, None, "bfloat16 needs opset 22, and the TorchScript.*dynamo=True"),
    ],
)
def test_opsets_of_the_older_exporter(tmp_path, calibrated, change, opset, message):
    model, x = calibrated
    if change is not None:
        change(model)
    with pytest.raises(ValueError, match=message):
        export_onnx(model, x, tmp_path / "m.onnx", opset=opset, dynamo=False)
    assert list(tmp_path.iterdir()) == []


def test_an_old_opset_by_the_older_exporter(tmp_path, calibrated):
    model, x = calibrated
    report = export_onnx(model, x, tmp_path / "m.onnx", opset=13, dynamo=False)
    assert report.opset == 13 and report.integer_weights == 4
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(got, model(x).detach(), atol=1e-6)


def test_bfloat16_in_the_reference_implementation(tmp_path, calibrated):
    from onnx.reference import ReferenceEvaluator

    model, x = nn.Sequential(quant_nn.QuantLinear(16, 8)), torch.randn(4, 16)
    calibrate(model, [x], progress=False)
    model.bfloat16()
    report = export_onnx(model, x.bfloat16(), tmp_path / "m.onnx")
    assert report.opset == 22
    file = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(file, full_check=True)
    given = x.bfloat16().view(torch.int16).numpy().view(onnx.helper.tensor_dtype_to_np_dtype(16))
    (got,) = ReferenceEvaluator(file).run(None, {file.graph.input[0].name: given})
    expected = model(x.bfloat16()).detach().float()
    np.testing.assert_allclose(got.astype(np.float32), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("weights", ["int8", "float"])
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_nothing_is_folded_and_biases_stay_float(tmp_path, calibrated, weights, dynamo):
    model, x = calibrated
    report = export_onnx(model, x, tmp_path / "m.onnx", weights=weights, dynamo=dynamo)
    stored = weights == "int8"
    assert report.quantize_nodes == (5 if stored else 9) and report.dequantize_nodes == 9
    assert report.integer_weights == (4 if stored else 0) and report.quantized_layers == 4
    graph = onnx.load(tmp_path / "m.onnx").graph
    held = {c.name: c for c in graph.initializer}
    for layer in (n for n in graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm")):
        assert held[layer.input[2]].data_type == TensorProto.FLOAT
    for node in (
        n
        for n in graph.node
        if n.op_type.endswith("quantizeLinear") or n.op_type == "QuantizeLinear"
    ):
        assert len(node.input) == 3 and node.input[1] in held and node.input[2] in held
        per_channel = len(held[node.input[1]].dims) == 1
        assert per_channel == any(a.name == "axis" for a in node.attribute)


def test_quantizers_share_no_constants(tmp_path):
    """Whoever edits the scale of one quantizer in the file means that one."""
    model = nn.Sequential(quant_nn.QuantLinear(4, 4), quant_nn.QuantLinear(4, 4))
    calibrate(model, [torch.randn(2, 4)], progress=False)
    for layer in model:
        layer._input_quantizer.amax = 2.0
    export_onnx(model, torch.randn(2, 4), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    scales = [n.input[1] for n in graph.node if n.op_type == "QuantizeLinear"]
    assert scales == ["0._input_quantizer.scale", "1._input_quantizer.scale"]


def test_no_quantizer_keeps_what_the_export_gave_it(tmp_path, calibrated):
    model, _ = calibrated
    with pytest.raises(Exception, match=r"torch\.export"):
        export_onnx(model, torch.randn(2, 5, 8, 8), tmp_path / "m.onnx")
    for quantizer in named_quantizers(model).values():
        assert "_handlers" not in vars(quantizer)


def test_an_amax_that_does_not_fit_its_input(tmp_path, calibrated):
    model, x = calibrated
    model[6]._weight_quantizer._amax = torch.ones(3, 1)
    with pytest.raises(Exception) as error:
        export_onnx(model, x, tmp_path / "m.onnx")
    told, cause = "", error.value
    while cause is not None:
        told, cause = told + str(cause), cause.__cause__
    assert (
        "6._weight_quantizer: an amax of shape (3, 1) does not fit an input of shape (5, 6)" in told
    )


class Twins(nn.Module):
    """Two inputs; attention on itself is called with one tensor for both."""

    def __init__(self):
        super().__init__()
        with quant_modules.initialize():
            self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x, y):
        return self.left(x), self.right(y[0])


@pytest.mark.parametrize("dynamo", [True, False])
def test_one_tensor_for_two_inputs(tmp_path, dynamo):
    model, x, y = Twins().eval(), torch.randn(3, 8), torch.randn(3, 8)
    calibrate(model, [(x, [y])], progress=False)
    export_onnx(model, (x, [x]), tmp_path / "m.onnx", dynamo=dynamo)
    left, right = onnx_runs.run(onnx.load(tmp_path / "m.onnx"), x.numpy(), y.numpy())
    expected = model(x, [y])
    np.testing.assert_allclose(left, expected[0].detach(), atol=1e-5)
    np.testing.assert_allclose(right, expected[1].detach(), atol=1e-5)


# The older exporter refuses too many names of outputs by itself.
@pytest.mark.parametrize(
    ("kind", "dynamo"), [("input_names", True), ("input_names", False), ("output_names", True)]
)
def test_too_many_names(tmp_path, kind, dynamo):
    model, x = nn.Linear(4, 4).eval(), torch.randn(2, 4)
    with pytest.raises(ValueError, match=rf"{kind} has 2 names, a, b, and the graph has 1: a"):
        export_onnx(model, x, tmp_path / "m.onnx", dynamo=dynamo, **{kind: ["a", "b"]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", ["20", 20.0, True])
def test_an_opset_that_is_no_number(tmp_path, opset):
    with pytest.raises(TypeError, match=f"opset is a whole number such as 20, got {opset!r}"):
        export_onnx(nn.Linear(4, 4), torch.randn(2, 4), tmp_path / "m.onnx", opset=opset)


def test_an_opset_that_is_none(tmp_path, capfd):
    with pytest.raises(ValueError, match=r"opset=99 is above \d+, the highest that the installed"):
        export_onnx(nn.Linear(4, 4), torch.randn(2, 4), tmp_path / "m.onnx", opset=99)
    assert capfd.readouterr().err == "", "the exporter was not started"
