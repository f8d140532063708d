import pytest
import torch
from torch import nn

from pytorch_quant import QuantDescriptor, calibrate, compute_amax
from pytorch_quant import nn as quant_nn
from pytorch_quant.calib import Calibrator, HistogramCalibrator, MaxCalibrator
from pytorch_quant.calib.methods import METHODS
from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.ptq.storage import load_calibration, save_calibration


def network(**fields):
    torch.manual_seed(0)
    desc = QuantDescriptor(**{"axis": 1, **fields})
    return nn.Sequential(
        quant_nn.QuantConv2d(1, 4, 3),
        nn.ReLU(),
        quant_nn.QuantConv2d(4, 6, 3, quant_desc_input=desc),
        nn.Flatten(),
        quant_nn.QuantLinear(24, 3),
    )


def images(count=5):
    """Later batches are larger, so that the ranges of shards differ."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 1, 6, 6, generator=generator) * 1.7**i for i in range(count)]


def calibrated(batches, method="mse", **options):
    model = network()
    calibrate(model, batches, method, progress=False, **options)
    return model


def amax(model):
    return {name: q.amax.clone() for name, q in named_quantizers(model).items()}


def assert_same_answers(model, wanted, methods=METHODS[:-1]):
    for method in methods:
        compute_amax(model, method)
        compute_amax(wanted, method)
        for name, value in amax(wanted).items():
            got = named_quantizers(model)[name].amax
            if method == "mean_max":
                torch.testing.assert_close(got, value, rtol=1e-6, atol=0)
            else:
                assert torch.equal(got, value), f"{method}: {name}"


@pytest.mark.parametrize("method", ["max", "mse", "best"])
def test_a_fresh_model_answers_as_the_saved_one(tmp_path, method):
    saved = calibrated(images(), method)
    save_calibration(saved, tmp_path / "held")
    fresh = network(num_bits=4)
    assert load_calibration(fresh, tmp_path / "held") is None
    assert all(q.amax is None for q in named_quantizers(fresh).values())
    for q in named_quantizers(fresh).values():
        q.num_bits = 8
    kind = MaxCalibrator if method == "max" else HistogramCalibrator
    assert type(fresh[2]._input_quantizer.calibrator) is kind
    assert_same_answers(fresh, saved, METHODS[:3] if method == "max" else METHODS[:-1])
    if method == "best":
        compute_amax(fresh, "best")
        compute_amax(saved, "best")
        assert torch.equal(fresh[4]._input_quantizer.amax, saved[4]._input_quantizer.amax)


def test_shards_merge_into_what_one_pass_finds(tmp_path):
    batches = images()
    paths = [tmp_path / f"shard{i}" for i in range(3)]
    for i, path in enumerate(paths):
        save_calibration(calibrated(batches[i : i + 1] if i < 2 else batches[2:]), path)
    whole = calibrated(batches)
    methods = ("max", "mean_max", "percentile", "mse", "entropy", "lp")
    model = network()
    load_calibration(model, paths)
    assert_same_answers(model, whole, methods)
    assert model[0]._input_quantizer.calibrator.seen == 5 * 5 * 36
    model = network()
    load_calibration(model, str(paths[2]))
    load_calibration(model, iter(paths[:2]), accumulate=True)
    assert_same_answers(model, whole, methods)
    load_calibration(model, paths)
    assert model[0]._input_quantizer.calibrator.seen == 5 * 5 * 36


def test_the_moving_averages_of_shards_are_weighted_by_batches(tmp_path):
    batches = images(4)
    for name, part in (("a", batches[:1]), ("b", batches[1:])):
        save_calibration(calibrated(part, "moving_max"), tmp_path / name)
    model = network()
    load_calibration(model, [tmp_path / "a", tmp_path / "b"])
    compute_amax(model, "moving_max")
    first, second, third, fourth = (float(x.abs().max()) for x in batches)
    moving = 0.9 * (0.9 * second + 0.1 * third) + 0.1 * fourth
    assert model[0]._input_quantizer.amax == pytest.approx(first / 4 + moving * 3 / 4, rel=1e-6)


@pytest.mark.parametrize("options", [{"method": "mse"}, {"method": "moving_max", "momentum": 0.5}])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, options):
    batches = images()

    def interrupted():
        yield from batches[:2]
        raise KeyboardInterrupt

    model = network()
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, interrupted(), progress=False, **options)
    assert model[0]._input_quantizer.calibrator.seen == 2 * 5 * 36
    save_calibration(model, tmp_path / "held")
    resumed, whole = network(), network()
    load_calibration(resumed, tmp_path / "held")
    calibrate(resumed, batches[2:], progress=False, accumulate=True, **options)
    calibrate(whole, batches, progress=False, **options)
    for name, value in amax(whole).items():
        assert torch.equal(amax(resumed)[name], value), name
    methods = METHODS[:-1] if options["method"] == "mse" else METHODS[:3]
    for method in methods:
        compute_amax(resumed, method)
        compute_amax(whole, method)
        for name, value in amax(whole).items():
            assert torch.equal(amax(resumed)[name], value), (method, name)


def test_the_settings_of_the_calibrator_come_back(tmp_path):
    model = network()
    held = HistogramCalibrator(8, 1, num_bins=300, skip_zeros=True, momentum=0.25)
    model[2]._input_quantizer._calibrator = held
    calibrate(model, images(1), "mse", progress=False, accumulate=True)
    assert model[2]._input_quantizer._calibrator is held
    save_calibration(model, tmp_path / "held")
    fresh = network()
    load_calibration(fresh, tmp_path / "held")
    got = fresh[2]._input_quantizer.calibrator
    assert (got._num_bins, got._skip_zeros, got.momentum) == (300, True, 0.25)
    assert torch.equal(got.histogram.counts, held.histogram.counts)
    calibrate(fresh, images(1), "mse", progress=False, accumulate=True)
    assert torch.equal(got.histogram.counts, 2 * held.histogram.counts)


def test_the_statistics_go_where_the_quantizer_is(tmp_path, device):
    model = network().to(device)
    batches = [x.to(device) for x in images(2)]
    calibrate(model, batches, "mse", progress=False)
    save_calibration(model, tmp_path / "held")
    state = torch.load(tmp_path / "held", weights_only=True)["quantizers"]["0._input_quantizer"]
    assert all(tensor.device.type == "cpu" for tensor in state["state"].values())
    fresh = network().to(device)
    load_calibration(fresh, tmp_path / "held")
    assert fresh[0]._input_quantizer.calibrator.histogram.counts.device.type == device.type
    calibrate(fresh, batches, "mse", progress=False, accumulate=True)


class Own(Calibrator):
    def compute_amax(self, *args, **kwargs):
        return torch.tensor(1.0)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no quantizer has statistics to save; run calibrate"):
        save_calibration(network(), tmp_path / "held")
    model = calibrated(images())
    with pytest.raises(FileNotFoundError, match="the folder"):
        save_calibration(model, tmp_path / "nowhere" / "held")
    model[2]._input_quantizer._calibrator = Own()
    with pytest.raises(TypeError, match=r"2\._input_quantizer has a Own of your own"):
        save_calibration(model, tmp_path / "held")
    assert not (tmp_path / "held").exists()


def unchanged(model):
    return {name: q.calibrator for name, q in named_quantizers(model).items()}


def refused(model, paths, message, error=ValueError, **options):
    """The model is refused the files, and keeps what it has."""
    before = unchanged(model)
    seen = {name: q.seen for name, q in before.items() if isinstance(q, Calibrator)}
    with pytest.raises(error, match=message):
        load_calibration(model, paths, **options)
    assert unchanged(model) == before
    assert {name: q.seen for name, q in before.items() if isinstance(q, Calibrator)} == seen


@pytest.fixture
def held(tmp_path):
    save_calibration(calibrated(images()), tmp_path / "held")
    return tmp_path / "held"


def test_files_that_are_none(tmp_path, held):
    model, path = network(), tmp_path / "other"
    refused(model, tmp_path / "missing", "missing", FileNotFoundError)
    refused(model, tmp_path, "irectory|denied", OSError)
    refused(model, [], "no files to load")
    refused(model, [held, tmp_path / ".." / tmp_path.name / "held"], "would count twice")
    torch.save(model.state_dict(), path)
    refused(model, path, r"other is no file of calibration statistics; .*load_state_dict")
    data = held.read_bytes()
    for wrong in (b"", b"\x93" * 100, b"some text", data[: len(data) // 2], data[:-1]):
        path.write_bytes(wrong)
        refused(model, path, r"other is no file of calibration statistics, or a damaged one")
    torch.save([1], path)
    refused(model, path, "other is no file of calibration statistics")


def edited(held, change):
    content = torch.load(held, weights_only=True)
    change(content)
    torch.save(content, held)


def test_a_file_of_a_newer_version(held):
    edited(held, lambda content: content.update(version=2))
    refused(network(), held, "has version 2 of the format, .* version 1; install a newer one")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.pop("kind"), "kind is None"),
        (lambda entry: entry.update(kind="other"), "kind is 'other'"),
        (lambda entry: entry.update(num_bins="many"), "num_bins is 'many'"),
        (lambda entry: entry.update(num_bins=7), "statistics of 2048 bins for a calibrator of 7"),
        (lambda entry: entry.pop("axis"), "axis or best is missing"),
        (lambda entry: entry.update(state={}), "the state is not of tensors"),
        (lambda entry: entry["state"].pop("total"), "needs total"),
        (lambda entry: entry["state"].pop("counts"), "holds counts"),
        (
            lambda entry: entry["state"].update(
                {k: torch.zeros(2) for k in ("largest", "total", "moving")}
            ),
            "counts of 1 channels for maxima of shape",
        ),
    ],
)
def test_damaged_entries(held, change, message):
    edited(held, lambda content: change(content["quantizers"]["4._input_quantizer"]))
    refused(network(), held, rf"held: 4\._input_quantizer: .*{message}.*the file is damaged")


def test_an_entry_that_is_nothing(held):
    edited(held, lambda content: content.update(quantizers={"4._input_quantizer": 3}))
    refused(network(), held, "no entry")
    edited(held, lambda content: content.update(quantizers={}))
    refused(network(), held, "names no quantizers")


def test_names_that_the_model_does_not_have(held):
    refused(
        network()[:4], held, r"1 quantizer.* does not have: 4\._input_quantizer \(near: 2\._input"
    )
    refused(
        nn.Sequential(network()),
        held,
        r"have: 0\._input_quantizer \(near: 0\.0\._input_quantizer\), ",
    )


def test_quantizers_of_another_format(tmp_path, held):
    refused(network(axis=None), held, r"2\._input_quantizer has axis=None, .*axis=1")
    refused(network(unsigned=True), held, r"2\._input_quantizer has unsigned=True, .*=False")
    refused(network(axis=None, dynamic=True), held, r"2\._input_quantizer has no calibrator")
    model = network()
    model[2]._input_quantizer.amax = torch.ones(1, 5, 1, 1)
    refused(model, held, r"2\._input_quantizer has an amax of shape \(1, 5, 1, 1\)")
    model = network()
    model[2]._input_quantizer._calibrator = Own(axis=1)
    refused(model, held, r"2\._input_quantizer has a Own of your own", TypeError)


def test_statistics_of_different_kinds_do_not_merge(tmp_path, held):
    path = tmp_path / "maxima"
    save_calibration(calibrated(images(), "max"), path)
    message = r"0\._input_quantizer: calibrator is HistogramCalibrator in .*held and MaxCalibrator"
    refused(network(), [held, path], message)
    message = "calibrator is MaxCalibrator in the model and HistogramCalibrator in .*held"
    refused(calibrated(images(), "max"), held, message, accumulate=True)
    # Replacing asks for no likeness.
    load_calibration(calibrated(images(), "max"), held)
    for field, model in (("num_bins", network()), ("skip_zeros", network())):
        options = {"num_bins": 64} if field == "num_bins" else {"skip_zeros": True}
        model[2]._input_quantizer._calibrator = HistogramCalibrator(8, 1, **options)
        calibrate(model, images(1), "mse", progress=False, accumulate=True)
        refused(model, held, rf"2\._input_quantizer: {field} is ", accumulate=True)


def test_quantizers_that_the_file_does_not_hold_keep_what_they_have(held):
    edited(held, lambda content: content["quantizers"].pop("4._input_quantizer"))
    model = calibrated(images(1))
    kept = model[4]._input_quantizer.calibrator
    with pytest.warns(
        UserWarning, match=r"1 quantizer.* keep what they have: 4\._input_quantizer$"
    ):
        load_calibration(model, held)
    assert model[4]._input_quantizer.calibrator is kept
    assert model[0]._input_quantizer.calibrator.seen == 5 * 5 * 36


def test_the_choice_of_best_survives_only_where_files_agree(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        save_calibration(calibrated(images(), "best"), path)
    edited(
        paths[1],
        lambda content: content["quantizers"]["4._input_quantizer"].update(best="percentile"),
    )
    edited(paths[0], lambda content: content["quantizers"]["4._input_quantizer"].update(best="max"))
    model = network()
    load_calibration(model, paths)
    assert model[4]._input_quantizer.calibrator.best is None
    assert model[0]._input_quantizer.calibrator.best is not None


def test_a_file_that_cannot_be_finished_leaves_the_old_one(held, monkeypatch):
    before = held.read_bytes()

    def broken(content, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space left"):
        save_calibration(calibrated(images(1)), held)
    assert held.read_bytes() == before and list(held.parent.iterdir()) == [held]


class Intruder:
    def __reduce__(self):
        return pytest.fail, ("loading has run code",)


def test_loading_runs_no_code(held):
    content = torch.load(held, weights_only=True)
    assert content["version"] == 1 and list(content["quantizers"]) == [
        "0._input_quantizer",
        "2._input_quantizer",
        "4._input_quantizer",
    ]
    torch.save(content | {"more": Intruder()}, held)
    refused(network(), held, "held is no file of calibration statistics, or a damaged one")
