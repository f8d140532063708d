"""The layers of the package, and what importing it must not do."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pytorch_quant

PACKAGE = Path(pytorch_quant.__file__).parent
# A file imports from its own layer and those below; the first prefix that fits decides.
LAYERS = [
    ("__init__", 8),
    ("__main__", 8),
    ("_version", 0),
    ("formats", 0),
    ("axes", 0),
    ("exporting", 0),
    ("traced_values", 0),
    ("versions", 0),
    ("blockwise", 0),
    ("rematerialized", 0),
    ("distributed", 0),
    ("einsum", 0),
    ("files", 0),
    ("optional", 0),
    ("tables", 0),
    ("descriptor", 1),
    ("scheme", 1),
    ("weight_presets", 1),
    ("fake_quant", 1),
    ("learned_range", 1),
    ("qdq", 1),
    ("qdq_blocks", 1),
    ("qdq_dynamic", 1),
    ("quant_functions", 1),
    ("tensor_quant", 1),
    ("utils", 1),
    ("calib", 2),
    ("nn", 3),
    ("batches", 3),
    ("quant_modules", 4),
    ("dataflow", 4),
    ("op_kinds", 4),
    ("example_inputs", 4),
    ("plain_pass", 3),
    ("placement", 4),
    ("quantization", 4),
    ("fold", 4),
    ("fold_pairs", 4),
    ("ptq", 5),
    ("qat", 5),
    ("improve", 5),
    ("export", 5),
    ("optim", 5),
    ("analysis", 5),
    ("models", 6),
    ("compat", 6),
    ("demo", 7),
    ("html_report", 7),
    ("cli", 7),
    ("commands", 7),
]
EXPORT_SEES = {
    "formats",
    "axes",
    "exporting",
    "versions",
    "files",
    "optional",
    "descriptor",
    "scheme",
    "weight_presets",
}
EXPORT_SEES |= {
    "batches",
    "einsum",
    "plain_pass",
    "tables",
    "fake_quant",
    "qdq",
    "qdq_blocks",
    "qdq_dynamic",
    "tensor_quant",
    "calib",
    "nn",
    "export",
}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def part(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def layer(name):
    return next(level for prefix, level in LAYERS if name == prefix)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "pytorch_quant":
                yield from (f"pytorch_quant.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    here = part(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "pytorch_quant" or len(parts) == 1:
            continue
        assert layer(parts[1]) <= layer(here), f"{path.name} imports {name}, which is above it"
        if here == "export":
            assert parts[1] in EXPORT_SEES, f"export imports {name}, a part of the workflow"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400


def test_no_drawers():
    # `utils` is a name that existing programs import; it holds nothing of its own.
    assert not {"utils", "helpers", "common", "misc"} & {p.stem for p in modules()}


PROBE = """
import logging, sys, torch
before = {name: id(value) for name, value in vars(torch.nn).items()}
handlers = list(logging.getLogger().handlers)
import pytorch_quant
loaded = {name.partition(".")[0] for name in sys.modules}
heavy = {"onnx", "onnxruntime", "onnxscript", "torchvision", "matplotlib", "sklearn"} & loaded
assert not heavy, heavy
assert logging.getLogger().handlers == handlers
assert not logging.getLogger("pytorch_quant").handlers
assert {name: id(value) for name, value in vars(torch.nn).items()} == before
"""


def test_nothing_happens_at_import():
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROBE], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == done.stderr == b""


def test_a_star_leaves_the_nn_of_torch():
    # All that a star could bring is there.
    importlib.import_module("pytorch_quant.nn")
    names = {}
    exec("from torch import nn\nfrom pytorch_quant import *", names)
    assert names["nn"].__name__ == "torch.nn" and "quantize" in names
