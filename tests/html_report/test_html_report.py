"""The page and its figures, beside references from the formulas."""

import copy
import inspect
import math
import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from page_reader import SECTIONS, read_page, rows, section
from report_models import RULES, tiny_models
from torch import nn

import pytorch_quant
from pytorch_quant import ReportFile, TensorQuantizer, calibrate, quantize, report
from pytorch_quant.analysis import sensitivity


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    plain, model, batches = tiny_models()
    path = tmp_path_factory.mktemp("report") / "report.html"
    result = report(
        model,
        batches,
        path,
        float_model=plain,
        rules=RULES,
        evaluate=score_on(batches),
        pictures=find_spec("matplotlib") is not None,
        progress=False,
    )
    return plain, model, batches, result, read_page(path)


def score_on(batches):
    def evaluate(model):
        with torch.no_grad():
            return 100 * float((model(batches[0][0]).argmax(1) == batches[0][1]).float().mean())

    return evaluate


def state_of(model):
    modules = {
        name: (id(m), m.training, tuple(m._modules), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }
    modes = {
        name: (m._disabled, m._if_quant, m._if_clip, m._if_calib)
        for name, m in model.named_modules()
        if isinstance(m, TensorQuantizer)
    }
    return modules, modes, {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(before, after):
    assert before[:2] == after[:2]
    assert all(torch.equal(value, after[2][key]) for key, value in before[2].items())


def test_the_name_is_the_function():
    assert inspect.isfunction(pytorch_quant.report)


def test_every_section_is_there_and_nothing_is_loaded(made):
    *_, result, page = made
    assert [node.attributes["id"] for node in page.find("section")] == SECTIONS
    ids = [n.attributes["id"] for n in page.find() if "id" in n.attributes]
    assert len(ids) == len(set(ids))
    for link in page.find("a"):
        assert link.attributes["href"].removeprefix("#") in ids
    for node in page.find():
        assert node.tag not in ("script", "link", "img", "iframe", "object")
        assert "src" not in node.attributes
    style = page.find("style")[0].text
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert not page.find("p", class_="missing failed")
    assert result.export_error == ""


def test_the_result_is_its_path(made):
    result = made[3]
    assert isinstance(result, ReportFile)
    with open(result) as file:
        assert file.read(15) == "<!DOCTYPE html>"
    assert str(result.path) in str(result) and "operators in int8" in str(result)


def fake(x, amax, bound=127):
    """Symmetric int8 from the formula of the operators, in NumPy."""
    scale = (amax / bound).astype(np.float32)
    return np.clip(np.rint(x / scale), -bound - 1, bound).astype(np.float32) * scale


def db(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    return 10 * math.log10((x**2).sum() / ((y - x) ** 2).sum())


def test_sqnr_of_tensors_is_that_of_numpy(made):
    plain, _, batches, _, page = made
    figures = {texts["quantizer"]: f["SQNR, dB"] for texts, f in rows(section(page, "tensors"))}
    images = torch.cat([x for x, _ in batches]).numpy()
    weight = plain.stem.weight.detach().numpy()
    expected = db(images, fake(images, np.abs(images).max()))
    assert figures["stem._input_quantizer"] == pytest.approx(expected, rel=1e-5)
    per_channel = np.abs(weight).max((1, 2, 3), keepdims=True)
    expected = db(weight, fake(weight, per_channel))
    assert figures["stem._weight_quantizer"] == pytest.approx(expected, rel=1e-5)


def test_sqnr_of_layers_is_that_of_a_model_quantized_by_hand(made):
    plain, _, batches, _, page = made
    figures = {texts["layer"]: f for texts, f in rows(section(page, "layers"))}
    hand = copy.deepcopy(plain)
    weight = plain.head.weight.detach().numpy()
    seen = []
    plain.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for x, _ in batches:
            plain(x)
    plain.head._forward_pre_hooks.clear()
    largest = torch.cat(seen).abs().max().numpy()
    hand.head.weight.data = torch.from_numpy(fake(weight, np.abs(weight).max(1, keepdims=True)))
    hand.head.register_forward_pre_hook(
        lambda _, args: (torch.from_numpy(fake(args[0].numpy(), largest)),)
    )
    with torch.no_grad():
        expected = np.concatenate([plain(x).numpy() for x, _ in batches])
        found = np.concatenate([hand(x).numpy() for x, _ in batches])
    assert figures["head"]["only it, dB"] == pytest.approx(db(expected, found), rel=1e-3)


def test_the_ranking_is_that_of_sensitivity(made):
    _, model, batches, result, page = made
    expected = sensitivity(model, batches, progress=False)
    assert [r.name for r in result.ranking.rows] == [r.name for r in expected.rows]
    assert result.ranking.rows[0].quantizers == expected.rows[0].quantizers
    shown = rows(section(page, "exclude"))
    assert [t["layer"].split(". ")[1] for t, _ in shown] == [r.name for r in expected.rows]
    assert [f["score"] for _, f in shown] == pytest.approx([r.score for r in expected.rows])
    noise = [10 ** (-r.score / 10) for r in expected.rows]
    assert shown[0][1]["left, dB"] == pytest.approx(-10 * math.log10(sum(noise[1:])))


def test_the_rules_can_be_pasted(made):
    plain, _, batches, result, page = made
    text = section(page, "exclude").find("pre", class_="paste")[0].text
    names = {"quantize": quantize, "float_model": copy.deepcopy(plain), "inputs": batches[0][0]}
    names["rules"] = RULES
    exec(text, names)
    assert "{**rules, **exclude}" in text
    assert names["exclude"] == {row.name: None for row in result.ranking.rows}
    assert not [m for m in names["model"].modules() if isinstance(m, TensorQuantizer)]


def lines_of(page, name):
    figures = {n.find("code")[0].text: n for n in page.find("figure")}
    return {
        li.attributes["data-method"]: float(li.find("span")[0].attributes["data-amax"])
        for li in figures[name].find("li")
        if "data-method" in li.attributes
    }


def test_clip_lines_are_those_of_calibrate(made):
    _, model, batches, _, page = made
    name = "block.second._input_quantizer"
    found = lines_of(page, name)
    assert next(iter(found)) == "in use" and len(found) == 9
    assert found["in use"] == found["max"] == float(model.get_submodule(name).amax)
    labels = {"percentile 99.99": "percentile", "lp 2.4": "lp"}
    for label in list(found)[1:]:
        method = "percentile" if label == "percentile 99.9" else labels.get(label, label)
        options = {"percentile": 99.9} if label == "percentile 99.9" else {}
        other = copy.deepcopy(model)
        calibrate(other, batches, method, progress=False, **options)
        assert found[label] == pytest.approx(float(other.get_submodule(name).amax), rel=1e-6)
    # A weight is one batch.
    assert {"mean_max", "moving_max"} == set(found) - set(lines_of(page, "stem._weight_quantizer"))


def test_means_of_maxima_are_those_of_numpy(made):
    *_, batches, _, page = made
    first, second = (float(np.abs(x.numpy()).max()) for x, _ in batches)
    found = lines_of(page, "stem._input_quantizer")
    assert found["mean_max"] == pytest.approx((first + second) / 2)
    assert found["moving_max"] == pytest.approx(0.9 * first + 0.1 * second)


def test_histograms_hold_every_value(made):
    from pytorch_quant.html_report.report import _histograms

    plain, model, batches, _, _ = made
    _, panels = _histograms(model, batches, None, None, progress=False)
    by_name = {panel.name: panel for panel in panels}
    activation, weight = by_name["stem._input_quantizer"], by_name["stem._weight_quantizer"]
    x = np.abs(torch.cat([x for x, _ in batches]).numpy()).ravel()
    assert sum(activation.counts) == pytest.approx(x.size) and activation.values == x.size
    expected, _ = np.histogram(x, bins=len(activation.counts), range=(0, activation.limit))
    # A column border cuts a bin of the histogram, whose values count as evenly spread; the
    # background of the images is one value, which lies in such a bin.
    apart = np.abs(np.cumsum(expected) - np.cumsum(activation.counts)) / x.size
    assert np.median(apart) < 1e-3 and apart.max() < 0.06
    w = np.abs(plain.stem.weight.detach().numpy()).reshape(16, -1)
    assert weight.relative and weight.channels == weight.rows == 16
    assert sum(weight.counts) == pytest.approx(w.size)
    expected, _ = np.histogram(w / w.max(1, keepdims=True), bins=80, range=(0, weight.limit))
    assert np.abs(np.cumsum(expected) - np.cumsum(weight.counts)).max() <= 2


def test_sizes_count_codes_and_scales(made):
    plain, _, _, _, page = made
    shown = {t["what"]: f["MB"] for t, f in rows(section(page, "size"))}
    parameters = list(plain.named_parameters())
    assert shown["weights, float"] == 4 * sum(p.numel() for _, p in parameters)
    expected = sum(
        p.numel() + 4 * p.shape[0] if name.endswith("weight") else 4 * p.numel()
        for name, p in parameters
    )
    assert shown["weights, quantized"] == expected


def test_scores_placement_and_prediction(made):
    plain, model, batches, result, page = made
    evaluate = score_on(batches)
    expected = {"float": evaluate(plain), "quantized": evaluate(model)}
    assert result.accuracy == expected
    assert {t["model"]: f["score"] for t, f in rows(section(page, "accuracy"))} == expected
    placed = [t for t, _ in rows(section(page, "placement"))]
    assert {t["place"] for t in placed} >= {"stem input", "stem weight", "block/add#0 input1"}
    assert any("residual" in t["why"] for t in placed)
    assert [t["place"] for t in placed if t["why"] == "-"] == []
    predicted = rows(section(page, "prediction"))
    assert len(predicted) == len(result.prediction.rows)
    assert {t["op"] for t, _ in predicted} >= {"Conv"}
    macs = [f["million MACs"] for t, f in predicted if t["op"] == "Conv"]
    assert 16 * 64 * 16 * 16 * 9 in macs


@pytest.mark.slow
def test_the_model_is_left_as_found(tmp_path):
    plain, model, batches = tiny_models("entropy")
    model.train()
    model.head._input_quantizer.disable()
    before, plain_before = state_of(model), state_of(plain)
    kept = {n: m._calibrator for n, m in model.named_modules() if isinstance(m, TensorQuantizer)}
    random = torch.get_rng_state()
    report(
        model,
        iter(batches),
        tmp_path / "r.html",
        float_model=plain,
        evaluate=lambda m: (m.train(), float(torch.rand(())))[1],
        latency=True,
        progress=False,
    )
    assert_same(before, state_of(model))
    assert_same(plain_before, state_of(plain))
    after = {n: m._calibrator for n, m in model.named_modules() if isinstance(m, TensorQuantizer)}
    assert kept == after
    assert torch.equal(random, torch.get_rng_state())
    page = read_page(tmp_path / "r.html")
    latency = [t for t in section(page, "size").find("table") if "Latency" in str(t.attributes)]
    assert len(latency[0].find("tbody")[0].find("tr")) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


class Strange(nn.Module):
    """Names that are markup, and a call that no exporter takes."""

    def __init__(self, exports=True):
        super().__init__()
        self.parts = nn.ModuleDict({'<script>alert("1")</script>&': nn.Linear(8, 8)})
        self.exports = exports

    def forward(self, x):
        (layer,) = self.parts.values()
        y = layer(x)
        return y if self.exports or torch.jit.is_tracing() else y * float(y.sum().item() > 0)


def test_names_are_escaped(tmp_path):
    batches = [torch.randn(4, 8)]
    model = quantize(Strange(), {nn.Linear: pytorch_quant.INT8}, example_inputs=batches[0])
    calibrate(model, batches, progress=False)
    result = report(
        model, batches, tmp_path / "r.html", accuracy={"<b>float": 1, "int8": 0.5}, progress=False
    )
    page = read_page(result.path)
    assert not page.find("script") and not page.find("b", id=None)[0].text.startswith("float")
    assert "<script>alert" in section(page, "layers").text
    assert "<b>float" in section(page, "accuracy").text


def test_an_export_that_fails_is_reported(tmp_path):
    batches = [torch.randn(4, 8)]
    model = quantize(Strange(False), {nn.Linear: pytorch_quant.INT8}, example_inputs=batches[0])
    calibrate(model, batches, progress=False)
    result = report(model, batches, tmp_path / "r.html", progress=False)
    assert "the export failed" in result.export_error and result.prediction is None
    page = read_page(result.path)
    for name in ("prediction", "lint"):
        assert "the export failed" in section(page, name).text
    assert "the export failed" in str(result)
    assert rows(section(page, "layers"))


def test_many_channels_zeros_blocks_and_dynamic_ranges(tmp_path):
    net = nn.Sequential(nn.Linear(32, 70), nn.ReLU(), nn.Linear(70, 8), nn.Linear(8, 8))
    with torch.no_grad():
        net[0].weight[0] = 0
        net[3].weight.zero_()
    batches = [torch.randn(16, 32)]
    rules = {
        "0": pytorch_quant.INT8,
        "2": pytorch_quant.INT8_DYNAMIC,
        "3": pytorch_quant.INT8_PER_TENSOR,
    }
    model = quantize(net, rules, example_inputs=batches[0], placement="onnxruntime")
    calibrate(model, batches, progress=False)
    result = report(model, batches, tmp_path / "r.html", target="onnxruntime", progress=False)
    text = read_page(result.path)
    figures = {n.find("code")[0].text: n.text for n in text.find("figure")}
    assert "70 ranges (32 drawn)" in figures["0._weight_quantizer"]
    assert "at run time" in figures["2._input_quantizer"]
    assert "only zeros" in figures["3._weight_quantizer"]
    # What was not asked for says how to have it.
    assert "evaluate=" in section(text, "accuracy").text
    assert "latency=True" in section(text, "size").text
    assert "float_model=" in section(text, "placement").text


def test_fp8_is_not_called_int8(tmp_path):
    batches = [torch.randn(16, 64)]
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model = quantize(net, {nn.Linear: pytorch_quant.FP8}, example_inputs=batches[0])
    calibrate(model, batches, progress=False)
    result = report(model, batches, tmp_path / "r.html", progress=False)
    assert "2 of 2 operators in fp8" in str(result)
    page = read_page(result.path)
    assert {t["runs in"] for t, _ in rows(section(page, "prediction"))} == {"fp8"}
    assert "fp8 in tensorrt" in page.find("dl")[0].text
    # Without rules= it says where they go.
    assert "{**rules, **exclude}" in section(page, "exclude").text


@pytest.mark.slow
def test_pasted_rules_are_for_the_same_runtime(tmp_path):
    plain, _, batches = tiny_models()
    images = batches[0][0]
    model = quantize(copy.deepcopy(plain), example_inputs=images, placement="onnxruntime")
    calibrate(model, batches, progress=False)
    result = report(model, batches, tmp_path / "r.html", target="onnxruntime", progress=False)
    text = section(read_page(result.path), "exclude").find("pre", class_="paste")[0].text
    text = re.sub(r"(?m)^    (?!.*block\.second).*$", "", text)
    names = {"quantize": quantize, "float_model": copy.deepcopy(plain), "inputs": images}
    exec(text, names)
    expected = quantize(
        copy.deepcopy(plain), {"block.second": None}, example_inputs=images, placement="onnxruntime"
    )
    placed = [
        {(n, m.unsigned) for n, m in net.named_modules() if isinstance(m, TensorQuantizer)}
        for net in (names["model"], expected)
    ]
    assert placed[0] == placed[1] and any(unsigned for _, unsigned in placed[0])


def test_pictures_of_names_that_look_like_formulas(tmp_path):
    pytest.importorskip("matplotlib")
    names = ["$\\frac{x$_{", "100 $ a%"]
    net = nn.Sequential()
    for name in names:
        net.add_module(name, nn.Linear(16, 16))
    batches = [torch.randn(4, 16)]
    model = quantize(net, {nn.Linear: pytorch_quant.INT8}, example_inputs=batches[0])
    calibrate(model, batches, progress=False)
    result = report(model, batches, tmp_path / "r.html", pictures=True, progress=False)
    assert len(result.pictures) == 3


def test_pictures(made):
    pytest.importorskip("matplotlib")
    result = made[3]
    folder = result.path.with_name("report_pictures")
    assert {p.name for p in folder.iterdir()} == {p.name for p in result.pictures}
    assert {re.sub(r"_\d+\.png", "", p.name) for p in result.pictures} == {
        "layers", "activations", "weights",
    }  # fmt: skip
    for picture in result.pictures:
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target": "tensorr"}, ValueError, "did you mean 'tensorrt'"),
        ({"accuracy": {"a": 1}, "evaluate": len}, ValueError, "not both"),
        ({"accuracy": 76.1}, TypeError, "mapping"),
        ({"accuracy": {"a": "high"}}, TypeError, "one number"),
        ({"evaluate": 3}, TypeError, "function"),
        ({"evaluate": lambda model: None}, TypeError, "one number"),
        ({"example_inputs": 3}, TypeError, "example_inputs"),
        ({"ranking": [1]}, TypeError, "ranking is what sensitivity"),
        ({"float_model": "resnet"}, TypeError, "float_model is a module, got str"),
        ({"pictures": __file__}, NotADirectoryError, "is a file"),
    ],
)
def test_wrong_use_raises_and_leaves_the_old_file(tmp_path, options, error, words):
    _, model, batches = tiny_models()
    path = tmp_path / "r.html"
    path.write_text("old")
    with pytest.raises(error, match=words):
        report(model, batches, path, progress=False, **options)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_models_that_are_none(tmp_path):
    _, model, batches = tiny_models()
    with pytest.raises(TypeError, match="model is a module, got NoneType"):
        report(None, batches, tmp_path / "r.html", progress=False)
    # `quantize` works in place: what looks like the float model may be the quantized one.
    with pytest.raises(ValueError, match=r"float_model has quantizers, such as stem\._input"):
        report(model, batches, tmp_path / "r.html", float_model=model, progress=False)


def test_bad_values_name_the_quantizer(tmp_path):
    _, model, batches = tiny_models()
    batches[0][0][0] = math.nan
    with pytest.raises(pytorch_quant.CalibrationError, match=r"stem\._input_quantizer"):
        report(model, batches, tmp_path / "r.html", progress=False)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report(model, batches, tmp_path / "none" / "r.html", progress=False)
