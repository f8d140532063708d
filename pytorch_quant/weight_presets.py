"""Descriptors of weights by layer type, under the names that existing programs use."""

from __future__ import annotations

from pytorch_quant.descriptor import QuantDescriptor

QUANT_DESC_8BIT_PER_TENSOR = QuantDescriptor(8)
QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR = QuantDescriptor(8, unsigned=True)

# Convolution weights are (K, C, ...): one amax per output channel K.
QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=0)
QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=0)
QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=0)
QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW = QuantDescriptor(8, axis=0)

# Transposed convolution weights are (C, K / groups, ...): the output channel is axis 1.
QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=1)
QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=1)
QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=1)
