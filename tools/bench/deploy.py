r"""What int8 files are worth: latency beside float and beside other toolkits, size, export time.

    python tools/bench/deploy.py
    python tools/bench/deploy.py --networks resnet18 mobilenet_v2 --json deploy.json
    python tools/bench/deploy.py --quick

prints a Markdown table for docs/performance.md, and exits with status 1 if a bound does not hold.
Networks are torchvision's, with random weights and the batch-norm statistics of random images:
latency does not depend on the values. Batch 1 of 224x224. `--quick` only shows that the benchmark
works, with a small network.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deploy_peers as peers
import torch
from timing import Case, Row, Seconds, bounded, interleaved, machine, quartiles, ratios, status
from timing import report as printed
from torch import Tensor, nn

from pytorch_quant import calibrate, export_onnx, fold_batchnorm, quantize
from pytorch_quant.files import written_aside
from pytorch_quant.models import BasicBlock, ResNet

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
OWN = {"onnxruntime": "ours, ONNX Runtime", "openvino": "ours, OpenVINO"}
BESIDE_PEER = 1.05
FASTER_THAN_FLOAT = {"resnet18": 2.8, "resnet50": 2.8, "mobilenet_v2": 2.0}
FASTER_THAN_TORCH = 5.0
EXPORT_RATIO = 2.5
SIZE_RATIO = 0.27


def network(name: str, images: Sequence[Tensor]) -> nn.Module:
    """The float network in eval mode, with norms that have seen the images."""
    if name == "small":
        model: nn.Module = ResNet(BasicBlock, [1, 1, 1, 1], 10, small_input=True, width=8)
    else:
        import torchvision

        model = getattr(torchvision.models, name)(weights=None)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    with torch.no_grad():
        model.train()(torch.cat(list(images[:4])))
    return model.eval()


def quantized(model: nn.Module, images: Sequence[Tensor], target: str) -> nn.Module:
    """Folded, quantized where `target` wants it, and calibrated; `model` is left alone."""
    made = copy.deepcopy(model)
    fold_batchnorm(made, images[0])
    quantize(made, example_inputs=images[0], placement=target)
    calibrate(made, images, progress=False)
    return made


def export_float(model: nn.Module, image: Tensor, path: Path) -> None:
    """A plain export."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (image,), str(path), dynamo=True, verbose=False, external_data=False
        )


def measure(name: str, folder: Path, args: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one network, and the latencies behind them in milliseconds."""
    pixels = 32 if name == "small" else 224
    images = [torch.randn(1, 3, pixels, pixels) for _ in range(args.images)]
    model = network(name, images)
    threads = torch.get_num_threads()
    float_file = folder / f"{name}.onnx"
    models = {target: quantized(model, images, target) for target in ("tensorrt", *OWN)}
    files = {target: folder / f"{name}_{target}.onnx" for target in models}

    def run_float() -> object:
        with torch.no_grad():
            return model(images[0])

    exports = [Case("float", lambda: export_float(model, images[0], float_file))]
    for target, made in models.items():
        exports.append(
            Case(
                target,
                lambda made=made, target=target: export_onnx(  # type: ignore[misc]
                    made, images[0], files[target], target=target
                ),
            )
        )
    export_times = interleaved(exports, min(args.rounds, 3), least_seconds=0, title="exports")

    cases = [Case("PyTorch, float", run_float)]
    add = cases.append
    add(Case("ONNX Runtime, float", peers.onnxruntime_run(float_file, images[0], threads)))
    add(Case("OpenVINO, float", peers.openvino_run(float_file, images[0], threads)))
    for target, run in (
        ("onnxruntime", peers.onnxruntime_run),
        ("openvino", peers.openvino_run),
    ):
        add(Case(OWN[target], run(files[target], images[0], threads)))
    add(
        Case(
            "ours, the file for TensorRT in ONNX Runtime",
            peers.onnxruntime_run(files["tensorrt"], images[0], threads),
        )
    )
    static = peers.static_files(float_file, images)
    for setting, file in static.items():
        add(Case(f"quantize_static, {setting}", peers.onnxruntime_run(file, images[0], threads)))
    add(Case("PyTorch FX, x86", peers.fx_run(model, images)))
    nncf = peers.nncf_run(float_file, images, threads)
    if nncf is not None:
        add(Case("NNCF, OpenVINO", nncf))
    cases = [Case(case.name, case.run, lambda run=case.run: _settled(run)) for case in cases]  # type: ignore[misc]
    times = interleaved(cases, args.rounds, least_seconds=args.least_seconds, title=name)
    rows = _rows(name, times, export_times, files, float_file)
    shown = {case: quartiles([t.done * 1000 for t in found]) for case, found in times.items()}
    return rows, {case: list(spread) for case, spread in shown.items()}


def _settled(run: peers.Run) -> None:
    # The waiting threads of the case before spin for a while, on the cores that this one needs.
    time.sleep(0.3)
    for _ in range(3):
        run()


def _rows(
    name: str,
    times: dict[str, list[Seconds]],
    exports: dict[str, list[Seconds]],
    files: dict[str, Path],
    float_file: Path,
) -> list[Row]:
    rows = []
    for case, found in times.items():
        spread = quartiles([t.done * 1000 for t in found])
        rows.append(Row(f"{name}: {case}", f"{spread:.2f} ms"))

    def faster(case: str, base: str, limit: float | None) -> None:
        spread = quartiles(ratios(times[base], times[case]))
        what = f"{name}: {case}, times faster than {base}"
        if limit is None:
            rows.append(Row(what, f"{spread:.2f}"))
        else:
            rows.append(bounded(what, spread.median, limit, f"{spread:.2f}", least=True))

    def beside(case: str, base: str, limit: float) -> None:
        spread = quartiles(ratios(times[case], times[base]))
        what = f"{name}: {case} / {base}"
        rows.append(bounded(what, spread.median, limit, f"{spread:.3f}"))

    static = [case for case in times if case.startswith("quantize_static")]
    fastest = min(static, key=lambda case: statistics.median(t.done for t in times[case]))
    beside(OWN["onnxruntime"], fastest, BESIDE_PEER)
    faster(OWN["onnxruntime"], "ONNX Runtime, float", FASTER_THAN_FLOAT.get(name))
    if "NNCF, OpenVINO" in times:
        beside(OWN["openvino"], "NNCF, OpenVINO", BESIDE_PEER)
    beside(OWN["openvino"], "PyTorch FX, x86", 1.0)
    faster(OWN["openvino"], "PyTorch, float", FASTER_THAN_TORCH)
    for target in OWN:
        spread = quartiles(ratios(exports[target], exports["float"]))
        what = f"{name}: export for {target} / float export"
        rows.append(bounded(what, spread.median, EXPORT_RATIO, f"{spread:.2f}"))
    largest = max(file.stat().st_size for file in files.values())
    size = largest / _size(float_file)
    rows.append(bounded(f"{name}: largest int8 file / float file", size, SIZE_RATIO, f"{size:.3f}"))
    return rows


def _size(file: Path) -> int:
    """Bytes of a file and of its external data."""
    data = file.with_name(f"{file.name}.data")
    return file.stat().st_size + (data.stat().st_size if data.exists() else 0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--networks", nargs="+", default=list(NETWORKS), metavar="NAME", help="of torchvision")
    add("--images", type=int, default=32, help="calibration images (default: 32)")
    add("--rounds", type=int, default=15, help="rounds of each timing (default: 15)")
    add("--quick", action="store_true", help="a small network and few rounds")
    add("--json", type=Path, metavar="FILE", help="write the rows as JSON too")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.images < 4:
        parser.error("--rounds must be at least 1, and --images at least 4")
    args.least_seconds = 0.3
    if args.quick:
        args.networks, args.images, args.rounds, args.least_seconds = ["small"], 4, 2, 0.01
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and return the exit status."""
    args = parse(argv)
    torch.manual_seed(0)
    rows: list[Row] = []
    latencies = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            found, latencies[name] = measure(name, Path(folder), args)
            rows += found
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "tools/bench/deploy.py", *given])
    print(printed("Int8 files at work", rows, command))
    if args.json is not None:
        content = {
            "machine": machine(),
            "command": command,
            "rows": [row._asdict() for row in rows],
            "milliseconds": latencies,
            "written": time.strftime("%Y-%m-%d"),
        }
        with written_aside(args.json) as path:
            Path(path).write_text(json.dumps(content, indent=2) + "\n")
    return status(rows)


if __name__ == "__main__":
    raise SystemExit(main())
