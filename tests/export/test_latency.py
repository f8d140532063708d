import json
import time
from typing import ClassVar

import onnx
import pytest
import torch
from onnx import helper

from pytorch_quant import compare_latency
from pytorch_quant.export import latency


def file(path, kind=1, shape=("n", 4), name="x"):
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], ["y"])],
        "copy",
        [helper.make_tensor_value_info(name, kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


class Sleeping:
    """A session that takes a known time and remembers when it ran."""

    ran: ClassVar[list] = []

    def __init__(self, seconds, port):
        self.seconds, self.inputs = seconds, [port]

    def run(self, tensors):
        self.ran.append((self.seconds, tensors[0].shape))
        time.sleep(self.seconds)


def test_files_take_turns(tmp_path, monkeypatch):
    first, second = file(tmp_path / "a.onnx"), file(tmp_path / "b.onnx")
    seconds = {first: 0.004, second: 0.001}
    port = latency.Port("x", torch.float32, (None, 4))
    monkeypatch.setattr(
        latency, "open_session", lambda path, *_, **__: Sleeping(seconds[path], port)
    )
    Sleeping.ran.clear()
    report = compare_latency([first, second], rounds=10, warmup=2, shapes={"x": (7, 4)})
    assert Sleeping.ran == [(0.004, (7, 4)), (0.001, (7, 4))] * 12
    slow, fast = report.rows
    assert slow.speedup == 1.0 and fast.speedup == slow.median / fast.median > 1.5
    assert slow.lower <= slow.median <= slow.upper and slow.median >= 4.0
    assert slow.size == first.stat().st_size


def test_real_files(tmp_path):
    paths = [file(tmp_path / "a.onnx"), file(tmp_path / "b.onnx", 7, ("n",), "ids")]
    report = compare_latency(paths, threads=1, rounds=3)
    assert report.shapes == {"x": [1, 4], "ids": [1]} and report.threads == 1
    assert json.loads(json.dumps(report.to_json()))["rows"][1]["path"] == str(paths[1])
    text = str(report)
    assert "onnxruntime, 1 thread(s), 3 rounds in turns, x (1, 4), ids (1,)" in text
    assert "b.onnx" in text and "median ms" in text


def test_wrong_use(tmp_path):
    path = file(tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="paths is a list of one or more files"):
        compare_latency([])
    with pytest.raises(ValueError, match="paths is a list"):
        compare_latency(path)
    with pytest.raises(ValueError, match="rounds must be >= 1"):
        compare_latency([path], rounds=0)
    with pytest.raises(ValueError, match="shapes names y, and the inputs are x"):
        compare_latency([path], shapes={"y": (1,)})
    with pytest.raises(ValueError, match=r"got shape \(2, 5\)"):
        compare_latency([path], shapes={"x": (2, 5)})
    with pytest.raises(ValueError, match="does not say the rank of 'x'; give it in shapes"):
        compare_latency([file(tmp_path / "b.onnx", shape=None)])
    with pytest.raises(ValueError, match=r"c\.onnx is not an ONNX file"):
        (tmp_path / "c.onnx").write_text("no")
        compare_latency([tmp_path / "c.onnx"])
