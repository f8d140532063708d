"""Layers that torch runs as one fused kernel in eval mode, which no exporter knows."""

import numpy as np
import onnxruntime
import torch
from torch import nn

from pytorch_quant import export_onnx


def test_a_float_transformer_layer(tmp_path):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    export_onnx(layer, x, tmp_path / "net.onnx")
    assert torch.backends.mha.get_fastpath_enabled()
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, layer(x).numpy(), atol=1e-5)
