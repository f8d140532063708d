from __future__ import annotations

import struct

import pytest
from torch import nn

from pytorch_quant import nn as quant_nn
from pytorch_quant.calib import load_calibration_cache, read_calibration_cache

HEADER = "TRT-8601-EntropyCalibration2"


def hex_of(scale):
    return struct.pack(">f", scale).hex()


def written(tmp_path, *lines, newline="\n", end="\n"):
    path = tmp_path / "model.cache"
    path.write_bytes((newline.join(lines) + end).encode())
    return path


def test_amax_is_127_scales(tmp_path):
    path = written(
        tmp_path,
        HEADER,
        "input.1: 3c010a14",
        f"(Unnamed Layer* 3) [Convolution]_output: {hex_of(0.5)}",
        f"model/net:0: {hex_of(2.0)}",
        f"a: b::c: {hex_of(1.0).upper()}",
        f"bild größe: {hex_of(0.25)}",
        "nothing: 0",
        f"tight:{hex_of(4.0)}",
    )
    amax = read_calibration_cache(path)
    assert list(amax.items())[1:] == [
        ("(Unnamed Layer* 3) [Convolution]_output", 63.5),
        ("model/net:0", 254.0),
        ("a: b::c", 127.0),
        ("bild größe", 31.75),
        ("nothing", 0.0),
        ("tight", 508.0),
    ]
    # 3c010a14: sign 0, exponent 0x78 - 127 = -7, fraction 0x010a14.
    assert amax["input.1"] == pytest.approx(127 * (1 + 0x010A14 / 2**23) * 2.0**-7, rel=1e-12)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n  \n"])
def test_line_ends_and_empty_lines(tmp_path, newline, end):
    path = written(tmp_path, HEADER, f"a: {hex_of(1.0)}", "", f"b: {hex_of(2.0)}", newline=newline)
    path.write_bytes(path.read_bytes().rstrip() + end.encode())
    assert read_calibration_cache(str(path)) == {"a": 127.0, "b": 254.0}


def test_digits_without_leading_zeros(tmp_path):
    scale = struct.unpack(">f", bytes.fromhex("00800000"))[0]
    path = written(tmp_path, HEADER, "a: 800000")
    assert read_calibration_cache(path) == {"a": 127 * scale}


def test_a_cache_without_tensors(tmp_path):
    assert read_calibration_cache(written(tmp_path, "TRT-100300-MinMaxCalibration")) == {}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a 3c010a14", r"expected 'tensor name: hex'.*got 'a 3c010a14'"),
        ("a: 3c010a1g", "expected 'tensor name: hex'.*3c010a1g"),
        ("a: 3c010a1400", "expected 'tensor name: hex'"),
        ("a: 0x3c01", "expected 'tensor name: hex'"),
        ("a: ", "expected 'tensor name: hex'"),
        (": 3c010a14", "expected 'tensor name: hex'"),
        (f"a: {hex_of(float('nan'))}", "scale of 'a' must be finite and >= 0, got 7fc00000 = nan"),
        (f"a: {hex_of(float('inf'))}", "scale of 'a' must be finite and >= 0, got 7f800000 = inf"),
        (f"a: {hex_of(-1.0)}", r"scale of 'a' must be finite and >= 0, got bf800000 = -1\.0"),
        (f"first: {hex_of(2.0)}", "tensor 'first' stands in this file twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = written(tmp_path, HEADER, f"first: {hex_of(1.0)}", line)
    with pytest.raises(ValueError, match=rf"model\.cache, line 3: .*{problem}"):
        read_calibration_cache(path)


@pytest.mark.parametrize("first", ["", f"a: {hex_of(1.0)}", "\x7fELF", "TRT"])
def test_another_file_is_refused(tmp_path, first):
    path = written(tmp_path, first, f"b: {hex_of(1.0)}")
    with pytest.raises(ValueError, match=r"model\.cache, line 1: expected a header such as 'TRT-"):
        read_calibration_cache(path)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "model.cache"
    path.write_bytes(HEADER.encode() + b"\n\xff\xfe: 3c010a14\n")
    with pytest.raises(ValueError, match=r"line 2: expected UTF-8 text, got b'\\xff"):
        read_calibration_cache(path)
    with pytest.raises(FileNotFoundError):
        read_calibration_cache(tmp_path / "none.cache")


def test_loading_into_a_model():
    model = nn.Sequential(quant_nn.QuantLinear(3, 2), quant_nn.QuantLinear(2, 2))
    cache = {"input.1": 2.5, "fc1_out": 4.0}
    places = {"0._input_quantizer": "input.1", "1._input_quantizer": "fc1_out"}
    load_calibration_cache(model, cache, places)
    assert [layer._input_quantizer.amax.tolist() for layer in model] == [2.5, 4.0]
    assert model[0]._weight_quantizer.amax is None


def test_unknown_names_are_answered_with_near_ones():
    model = nn.Sequential(quant_nn.QuantLinear(3, 2), quant_nn.QuantLinear(2, 2))
    good = {"0._input_quantizer": "input.1"}
    for bad, problem in (
        ({"1.input_quantizer": "input.1"}, r"named '1\.input_quantizer'; near.*'1\._input_quan"),
        ({"1._input_quantizer": "input.2"}, r"1\._input_quantizer: .*'input\.2'; near.*'input\.1'"),
        ({"1._input_quantizer": "zzz"}, r"no tensor named 'zzz'; its names are: 'input\.1'"),
        ({"0": "input.1"}, "no quantizer named '0'"),
    ):
        with pytest.raises(ValueError, match=problem):
            load_calibration_cache(model, {"input.1": 2.5}, good | bad)
        assert model[0]._input_quantizer.amax is None
