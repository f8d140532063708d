"""Stands in for the package until its first import, which installs the alias instead."""

import sys

from pytorch_quant.compat.alias import OLD_NAME, install_as_pytorch_quantization

if __name__ == OLD_NAME:
    # The import system returns what it finds under this name in the end.
    del sys.modules[OLD_NAME]
    install_as_pytorch_quantization()
    __import__(OLD_NAME)
