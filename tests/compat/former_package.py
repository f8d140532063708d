"""Pickles as the old package wrote them, made by hand."""

from __future__ import annotations

import sys
import types

import reference
import torch
from torch import nn


class Former:
    """Classes as the old package had them: attributes, no behaviour."""

    def __init__(self):
        self.modules = {}
        quantizer = "nn.modules.tensor_quantizer", "TensorQuantizer"
        self.TensorQuantizer = self.make(*quantizer, nn.Module)
        self.QuantConv2d = self.make("nn.modules.quant_conv", "QuantConv2d", nn.Conv2d)
        self.QuantLinear = self.make("nn.modules.quant_linear", "QuantLinear", nn.Linear)
        self.QuantAvgPool2d = self.make("nn.modules.quant_pooling", "QuantAvgPool2d", nn.AvgPool2d)
        self.Clip = self.make("nn.modules.clip", "Clip", nn.Module)
        self.MaxCalibrator = self.make("calib.max", "MaxCalibrator", object)
        self.HistogramCalibrator = self.make("calib.histogram", "HistogramCalibrator", object)
        self.ScaledQuantDescriptor = self.make("tensor_quant", "ScaledQuantDescriptor", object)

    def make(self, path, name, base):
        path = f"pytorch_quantization.{path}"
        made = type(name, (base,), {"__module__": path})
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            module = ".".join(parts[:length])
            self.modules.setdefault(module, types.ModuleType(module))
        setattr(self.modules[path], name, made)
        return made

    def quantizer(self, axis=None, amax=None, calibrator=None, **fields):
        made = self.TensorQuantizer()
        made.__dict__.update(
            _num_bits=8,
            _fake_quant=True,
            _axis=axis,
            _scale_amax=None,
            _learn_amax=False,
            _unsigned=False,
            _narrow_range=False,
            _scale=None,
            _disabled=False,
            _if_quant=True,
            _if_clip=False,
            _if_calib=False,
            _calibrator=calibrator,
        )
        made.__dict__.update(fields)
        if amax is not None:
            made.register_buffer("_amax", torch.as_tensor(amax, dtype=torch.float32))
        return made

    def calibrator(self, kind, **fields):
        made = getattr(self, kind)()
        made.__dict__.update(_num_bits=8, _axis=None, _unsigned=False, **fields)
        return made

    def layer(self, kind, *arguments, x_amax=None, calibrator=None):
        made = getattr(self, kind)(*arguments)
        made._fake_quant = True
        made._input_quantizer = self.quantizer(None, x_amax, calibrator)
        if hasattr(made, "weight"):
            amax = reference.amax_of(made.weight.detach().numpy(), 0)
            made._weight_quantizer = self.quantizer(0, amax)
        return made

    def save(self, content, path):
        sys.modules.update(self.modules)
        try:
            torch.save(content, path)
        finally:
            for name in self.modules:
                del sys.modules[name]
        return path
