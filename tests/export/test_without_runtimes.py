"""ONNX Runtime and OpenVINO are extras; a process of its own has neither."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.contract
PROGRAM = Path(__file__).with_name("without_runtimes.py")
OPENVINO = 'pip install "pytorch-quant[openvino]"'
ONNXRUNTIME = 'pip install "pytorch-quant[onnxruntime]"'
GPU = "onnxruntime-gpu serves as well: the same module, with the CUDA and TensorRT providers"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    root = str(PROGRAM.parents[2])
    places = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    folder = tmp_path_factory.mktemp("without")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder)],
        env=os.environ | {"PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "demo").exists()
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_the_way_to_a_file_needs_neither(seen, target):
    assert seen[f"quantized layers for {target}"] == 3 and seen[f"errors for {target}"] == []
    assert seen[f"int8 for {target}"] > 0.9
    assert seen["repairs"] > 0


def test_layers_are_compared_in_the_reference(seen):
    ok, quantizers, engines = seen["verified"]
    assert ok and quantizers >= 2 and engines == ["layer by layer", "onnx.reference"]
    prefix = "not installed; install it with"
    assert seen["not run"]["ONNX Runtime"] == f"{prefix} {ONNXRUNTIME}; {GPU}"
    assert seen["not run"]["OpenVINO"] == f"{prefix} {OPENVINO}"


@pytest.mark.parametrize(
    "what",
    [
        "verify of a large graph",
        "verify there",
        "convert, onnxruntime",
        "load, onnxruntime",
        "latency",
        "demo",
        "page",
        "bench",
        "quantize --verify",
    ],
)
def test_the_rest_names_the_extra(seen, what):
    assert "needs onnxruntime, which cannot be imported (No module named" in seen[what]
    assert f"install it with {ONNXRUNTIME}; {GPU}" in seen[what]


@pytest.mark.parametrize("what", ["verify in OpenVINO", "convert, openvino", "load, openvino"])
def test_openvino_has_its_own_extra(seen, what):
    assert "needs openvino" in seen[what] and seen[what].endswith(OPENVINO)


@pytest.mark.parametrize("what", ["convert, auto", "load, auto", "load"])
def test_where_either_would_do_both_are_named(seen, what):
    assert seen[what] == (
        "this needs OpenVINO or ONNX Runtime, and neither is installed; install one of them with "
        f"{OPENVINO} or {ONNXRUNTIME}; {GPU}"
    )
