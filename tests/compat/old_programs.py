"""What existing programs do, in small."""

from __future__ import annotations

import reference
import torch
from torch import nn
from torch.nn import functional as F


def conv_and_linear(old, method="max"):
    """A model as `initialize` builds it, with inputs that use `method`."""
    desc = old.tensor_quant.QuantDescriptor(calib_method=method)
    with old.quant_modules.initialize():
        conv = nn.Conv2d(3, 4, 3, quant_desc_input=desc)
        linear = nn.Linear(4 * 6 * 6, 5, quant_desc_input=desc)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), linear).eval()


def quantizers(old, model):
    return {n: m for n, m in model.named_modules() if isinstance(m, old.nn.TensorQuantizer)}


def tutorial_loop(old, model, batches, **arguments):
    found = quantizers(old, model).values()
    with torch.no_grad():
        for q in found:
            if q._calibrator is not None:
                q.disable_quant()
                q.enable_calib()
            else:
                q.disable()
        for x in batches:
            model(x)
        for q in found:
            if q._calibrator is not None:
                q.enable_quant()
                q.disable_calib()
            else:
                q.enable()
        for q in found:
            if isinstance(q._calibrator, old.calib.MaxCalibrator):
                q.load_calib_amax(strict=False)
            elif q._calibrator is not None:
                q.load_calib_amax(**arguments)
    return model.to("cpu")


def conv_reference(layer, x):
    """A convolution of values that NumPy has fake-quantized, with the amax of the layer."""
    x = reference.fake_quant(x.numpy(), layer._input_quantizer._amax.numpy())
    weight = layer.weight.detach().numpy()
    weight = reference.fake_quant(weight, reference.amax_of(weight, 0))
    options = layer.stride, layer.padding, layer.dilation, layer.groups
    return F.conv2d(torch.from_numpy(x), torch.from_numpy(weight), layer.bias, *options).detach()


BATCHES = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in range(3)]
