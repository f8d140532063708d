"""Training helpers under the names that existing programs import."""

from pytorch_quant.optim import helper

__all__ = ["helper"]
