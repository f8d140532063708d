"""The alias, installed for one test."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pytorch_quant.compat import alias


@pytest.fixture
def not_installed():
    """No alias, whatever ran before in this process."""
    before = any(type(finder) is alias._Finder for finder in sys.meta_path)
    alias.uninstall()
    yield
    alias.uninstall()
    if before:
        alias.install_as_pytorch_quantization()


@pytest.fixture
def old(not_installed):
    """The modules of the old package as programs name them."""
    alias.install_as_pytorch_quantization()
    import pytorch_quantization
    from pytorch_quantization import calib, quant_modules, tensor_quant
    from pytorch_quantization import nn as quant_nn
    from pytorch_quantization.nn.modules import _utils as quant_nn_utils

    yield SimpleNamespace(
        package=pytorch_quantization,
        calib=calib,
        nn=quant_nn,
        quant_modules=quant_modules,
        tensor_quant=tensor_quant,
        mixins=quant_nn_utils,
    )
    quant_nn.TensorQuantizer.use_fb_fake_quant = False


@pytest.fixture
def python(tmp_path):
    """Run Python in a fresh process, in `tmp_path`."""

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout, done.stderr

    return run
