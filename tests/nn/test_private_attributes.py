"""Who reaches into quantizers: `nn` alone, and into calibrators: `calib` alone."""

import ast
from pathlib import Path

import pytest

import pytorch_quant
from pytorch_quant import QuantDescriptor, TensorQuantizer
from pytorch_quant.calib import HistogramCalibrator, MaxCalibrator

PACKAGE = Path(pytorch_quant.__file__).parent
# Fields by which quantizers were changed from outside before, and methods that did it.
FORMER = {"_kept", "_write_pair", "_store_amax", "_effective_amax", "_make_calibrator"}


def private(objects):
    """The private fields, properties and methods of objects, but for those of any module."""
    names = {name for held in objects for name in dir(held) if name[0] == "_" != name[1]}
    return names - set(dir(pytorch_quant.nn.Clip(0.0, 1.0)))


def quantizers():
    moving = TensorQuantizer(QuantDescriptor(amax=1.0))
    moving.follow_range(0.5)
    learned = TensorQuantizer(QuantDescriptor(learn_amax=True))
    return [moving, learned, TensorQuantizer(QuantDescriptor(dynamic=True))]


OF_QUANTIZERS = private(quantizers()) | FORMER
OF_CALIBRATORS = private([MaxCalibrator(), HistogramCalibrator()])


def reached(path, names):
    """The lines of a file that read, write or delete one of the names on anything but itself."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in names:
            if not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value in names:
                yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            held = ast.unparse(node.value)
            if node.slice.value in names and ("__dict__" in held or "vars(" in held):
                yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def files(but):
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] != but]


@pytest.mark.parametrize("path", files("nn"), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_private_attribute_of_a_quantizer_is_read_outside_of_nn(path):
    # A calibrator shares the names of some fields.
    own = OF_CALIBRATORS if path.relative_to(PACKAGE).parts[0] == "calib" else set()
    assert not list(reached(path, OF_QUANTIZERS - own))


@pytest.mark.parametrize("path", files("calib"), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_private_attribute_of_a_calibrator_is_read_outside_of_calib(path):
    own = OF_QUANTIZERS if path.relative_to(PACKAGE).parts[0] == "nn" else set()
    assert not list(reached(path, OF_CALIBRATORS - own))


def test_the_test_sees_them(tmp_path):
    expected = {"_calibrator", "_if_quant", "_if_clip", "_if_calib", "_disabled", "_block_size"}
    expected |= {"_learn_amax", "_axis", "_num_bits", "_unsigned", "_narrow_range", "_fake_quant"}
    expected |= {"_dynamic", "_fixed", "_scale_amax", "_pre_quant_scale", "_amax", "_process"}
    expected |= {"_range_method", "_range_momentum", "_scaled", "_quantize", "_handlers"}
    assert expected <= OF_QUANTIZERS
    assert {"_maxima", "_num_bins", "_skip_zeros", "_axis", "_unsigned"} <= OF_CALIBRATORS
    path = tmp_path / "reaching.py"
    path.write_text(
        "q._amax\nq._axis = 1\ngetattr(q, '_fixed')\nvars(q)['_amax'] = 1\nself._axis\ndel q._amax"
    )
    assert len(list(reached(path, OF_QUANTIZERS))) == 5
