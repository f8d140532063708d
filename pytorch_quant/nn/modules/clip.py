"""`Clip` under an old module path; see `pytorch_quant.nn.clip`."""

from pytorch_quant.nn.clip import Clip

__all__ = ["Clip"]
