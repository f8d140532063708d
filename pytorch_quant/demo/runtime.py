"""Running the exported files, and timing them side by side."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pytorch_quant.demo.digits import Split
from pytorch_quant.optional import require


def open_session(path: Path, *, optimize: bool = True) -> Any:
    """An ONNX Runtime session on the CPU with torch's number of threads."""
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def predict_onnx(session: Any, data: Split, description: str) -> torch.Tensor:
    """The predicted class of every image, shape `(N,)`."""
    name = session.get_inputs()[0].name
    batches = tqdm(data, desc=description, leave=False)
    logits = [session.run(None, {name: images.numpy()})[0] for images, _ in batches]
    return torch.from_numpy(np.concatenate(logits)).argmax(1)


def latencies(sessions: list[Any], image: torch.Tensor, rounds: int = 50) -> list[float]:
    """The median time of one run of each session in milliseconds, measured in turns."""
    feeds = [{session.get_inputs()[0].name: image.numpy()} for session in sessions]
    times: list[list[float]] = [[] for _ in sessions]
    for turn in range(rounds + 5):
        for session, feed, taken in zip(sessions, feeds, times, strict=True):
            started = time.perf_counter()
            session.run(None, feed)
            if turn >= 5:
                taken.append(1e3 * (time.perf_counter() - started))
    return [median(taken) for taken in times]
