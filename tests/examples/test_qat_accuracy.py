"""The accuracy experiment: its networks, its folds, its tables, and a run of seconds."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    """Imports a file of the example by the end of its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield lambda end="": importlib.import_module(f"qat_accuracy{end}")


@pytest.mark.parametrize("network", ["MobileNetV2", "ResNet"])
def test_rescaling_keeps_every_bit(example, network):
    from pytorch_quant import fold_batchnorm

    models = example("_models")
    model = models.NETWORKS[network]()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias)
            module.running_mean.normal_()
    images = torch.randn(3, 1, 32, 32)
    fold_batchnorm(model.eval(), images)
    hard = models.rescaled(model)
    with torch.no_grad():
        expected = model(images)
        assert expected.std() > 0 and torch.equal(hard(images), expected)
    ratios = [
        (b / a)[a != 0].unique()
        for (name, a), b in zip(model.named_parameters(), hard.parameters(), strict=True)
        if name.endswith("weight") and a.dim() == 4
    ]
    assert all((ratio.log2() % 1 == 0).all() for ratio in ratios)
    assert max(len(ratio) for ratio in ratios) > 5


def test_each_image_is_tested_once_per_seed(example):
    training = example("_training")
    settings = training.Settings()
    seen = {}
    for seed in settings.numbers:
        parts = [training.fold_of(seed, fold, settings) for fold in range(settings.folds)]
        assert torch.equal(torch.cat([p[2] for p in parts]).sort().values, torch.arange(1797))
        assert all(torch.equal(p[0], parts[0][0]) for p in parts)
        seen[seed] = tuple(parts[0][2].tolist())
    assert len(set(seen.values())) == settings.seeds


def test_the_tables(example):
    """Three methods on ten images and two seeds, counted by hand."""
    training, tables = example("_training"), example("_tables")
    settings = training.Settings(seeds=2, folds=1, images=10)
    rows = {
        training.FLOAT: ([0], []),
        training.row(8, training.TENSOR): ([0], [1]),
        training.row(8, training.CHANNEL): ([0], []),
        training.row(8, training.QAT): ([0], [0, 1, 2]),
        training.row(4, training.TENSOR): ([0, 1, 2, 3], [0, 1, 2, 3]),
        training.row(4, training.CHANNEL): ([0, 1], [0, 2, 3, 4]),
        training.row(4, training.QAT): ([0], [0]),
        training.row(8, training.TENSOR, training.RESCALED): ([0, 1, 2], [0, 1, 2]),
        training.row(8, training.CHANNEL, training.RESCALED): ([0], []),
    }
    cells = {
        f"ResNet/{seed}/0": {"wrong": {name: wrong[seed - 1] for name, wrong in rows.items()}}
        for seed in (1, 2)
    }
    text = tables.tables({"cells": cells}, settings).splitlines()
    lines = {line.split(" | ")[0].strip("| "): line for line in text if line.startswith("| ")}
    accuracies = "95.00 ± 7.07 | 95.00 ± 7.07 | 95.00 ± 7.07"
    assert lines["FP32"] == f"| FP32 | {accuracies} |"
    # Two seeds: the deviation is their distance by the root of 2.
    assert lines["per-tensor, max"].startswith(
        "| per-tensor, max | 90.00 ± 0.00 | 60.00 ± 0.00 | 70.00 ± 0.00 |"
    )
    assert lines["QAT"] == "| QAT | 80.00 ± 14.14 | 90.00 ± 0.00 |  |"
    # Of ten images, the ones that differ: 1 by half, 2 by half, 3 by half, 4 by minus a half.
    found = lines["per-channel less per-tensor, 4 bits"]
    assert found == (
        "| per-channel less per-tensor, 4 bits | 10.00 | -9.60 to 29.60 | at least 10 | yes |"
    )
    assert "| 25.00 |" in lines["per-channel less per-tensor, 8 bits, rescaled"]
    assert lines["QAT less FP32, 4 bits"].endswith("| at least -1 | no |")
    assert "| -15.00 |" in lines["QAT less FP32, 8 bits"]
    # PTQ 70, QAT 90, FP32 95.
    assert "| 80 % |" in lines[tables.RECOVERED] and lines[tables.RECOVERED].endswith("| yes |")


@pytest.mark.slow
def test_a_run_of_seconds_goes_on_where_it_stopped(example, tmp_path, monkeypatch, capsys):
    run = example()
    small = example("_training").Settings(seeds=1, folds=2, epochs=1, qat_epochs=1, images=160)
    monkeypatch.setattr(run, "SMOKE", small)
    monkeypatch.setattr(run, "NETWORKS", {"ResNet": None})
    path = tmp_path / "results" / "smoke.json"
    argv = ["--smoke", "--output", str(path)]
    assert run.main(argv) == 0
    printed = capsys.readouterr()
    assert "networks trained: 100%" in printed.err
    assert printed.out.count("| QAT |") == 1
    held = json.loads(path.read_text())
    assert list(held["cells"]) == ["ResNet/1/0", "ResNet/1/1"]
    rows = held["cells"]["ResNet/1/0"]["wrong"]
    assert len(rows) == 10 and rows["FP32"] == rows["FP32 rescaled"]

    lost = held["cells"].pop("ResNet/1/1")
    path.write_text(json.dumps(held))
    assert run.main([*argv, "--table-only"]) == 0
    assert capsys.readouterr().out.startswith("1 of 2 networks are missing; ")

    measured = []
    monkeypatch.setattr(run, "measure", lambda *cell: measured.append(cell) or lost)
    assert run.main(argv) == 0
    assert measured == [("ResNet", 1, 1, small)]
    assert capsys.readouterr().out == printed.out


def test_results_of_other_settings_are_not_mixed(example, tmp_path):
    run = example()
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"settings": {"seeds": 9}, "cells": {}}))
    with pytest.raises(SystemExit, match=r"holds results with the settings .*give another"):
        run.main(["--output", str(path)])
    path.write_text("{")
    with pytest.raises(SystemExit, match="is no file of results"):
        run.main(["--output", str(path)])


def test_bad_arguments(example, tmp_path, capsys):
    for argv, message in (
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--table-only", "--output", str(tmp_path / "none")], "none does not exist"),
    ):
        with pytest.raises(SystemExit):
            example().main(argv)
        assert message in capsys.readouterr().err
