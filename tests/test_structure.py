"""The layers of the package, and what importing it must not do."""

import ast
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pytorch_quant

PACKAGE = Path(pytorch_quant.__file__).parent
# A part of the package, a file or a folder, imports from its own layer and those below.
LAYERS = {
    0: (
        "_version axes blockwise distributed einsum exporting files formats optional "
        "rematerialized tables traced_values versions"
    ),
    1: (
        "descriptor fake_quant learned_range qdq qdq_blocks qdq_dynamic quant_functions "
        "scheme tensor_quant utils weight_presets"
    ),
    2: "calib",
    3: "batches nn plain_pass",
    4: ("dataflow example_inputs fold fold_pairs op_kinds placement quant_modules quantization"),
    5: "analysis export improve optim ptq qat",
    6: "compat models",
    7: "cli commands demo html_report",
    8: "__init__ __main__",
}
LAYER_OF = {part: level for level, parts in LAYERS.items() for part in parts.split()}
# What export imports: nothing of the workflow.
EXPORT_SEES = [
    "axes",
    "batches",
    "einsum",
    "export",
    "exporting",
    "fake_quant",
    "files",
    "formats",
    "nn",
    "optional",
    "plain_pass",
    "qdq",
    "qdq_blocks",
    "tables",
]


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def part(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def module_name(path):
    parts = ("pytorch_quant", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in modules()}


@functools.cache
def imported(path):
    """The modules of the package that a file imports, those inside of its functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in named]
        else:
            continue
        found.update(name for name in names if name.partition(".")[0] == "pytorch_quant")
    return found


def circles(arrows):
    """The sets of nodes that can be reached from one another.

    Args:
        arrows: For each node the nodes that it points to.
    """
    reached = {node: set(targets) for node, targets in arrows.items()}
    for middle in arrows:
        for targets in reached.values():
            if middle in targets:
                targets |= reached[middle]
    alike = {
        frozenset(other for other in targets if node in reached[other])
        for node, targets in reached.items()
    }
    return sorted(sorted(group) for group in alike if group)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    here = part(path)
    for name in imported(path):
        there = part(MODULES[name])
        assert LAYER_OF[there] <= LAYER_OF[here], f"{path.name} imports {name}, which is above it"


def test_the_layers_are_those_of_the_package():
    assert sorted(LAYER_OF) == sorted({part(path) for path in modules()})
    assert sum(len(parts.split()) for parts in LAYERS.values()) == len(LAYER_OF)


def test_export_sees_nothing_of_the_workflow():
    seen = {
        part(MODULES[name])
        for path in modules()
        if part(path) == "export"
        for name in imported(path)
    }
    assert sorted(seen) == EXPORT_SEES


def test_no_circles():
    assert circles({name: imported(path) for name, path in MODULES.items()}) == []


def test_circles_are_seen():
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "e"}, "e": {"e"}}
    assert circles(arrows) == [["b", "c"], ["e"]]


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
