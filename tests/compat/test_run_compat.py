"""`python -m pytorch_quant run-compat`: scripts as they were written for the old package."""

import sys

import numpy as np
import onnx_runs
import pytest
import torch

from pytorch_quant.cli import main

OLD_PROGRAM = """
import argparse
import sys

import numpy as np
import onnx
import torch
from torch import nn

import pytorch_quantization
from pytorch_quantization import calib, quant_modules
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor


def build(kind):
    desc = QuantDescriptor(calib_method=kind)
    quant_nn.QuantConv2d.set_default_quant_desc_input(desc)
    quant_nn.QuantLinear.set_default_quant_desc_input(desc)
    quant_modules.initialize()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 5),
    )
    quant_modules.deactivate()
    return model.eval()


def collect_stats(model, batches):
    for name, module in model.named_modules():
        if isinstance(module, quant_nn.TensorQuantizer):
            if module._calibrator is not None:
                module.disable_quant()
                module.enable_calib()
            else:
                module.disable()
    for x in batches:
        model(x)
    for name, module in model.named_modules():
        if isinstance(module, quant_nn.TensorQuantizer):
            if module._calibrator is not None:
                module.enable_quant()
                module.disable_calib()
            else:
                module.enable()


def compute_amax(model, **kwargs):
    for name, module in model.named_modules():
        if isinstance(module, quant_nn.TensorQuantizer):
            if module._calibrator is not None:
                if isinstance(module._calibrator, calib.MaxCalibrator):
                    module.load_calib_amax()
                else:
                    module.load_calib_amax(**kwargs)
    model.to("cpu")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_args()
    assert options.debug and sys.argv[0].endswith("program.py")
    rng = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 3, 8, 8, generator=rng) for _ in range(3)]
    percentile = {"method": "percentile", "percentile": 99.9}
    for kind, arguments in (("max", {}), ("histogram", percentile)):
        model = build(kind)
        with torch.no_grad():
            collect_stats(model, batches)
            compute_amax(model, **arguments)
        quant_nn.TensorQuantizer.use_fb_fake_quant = True
        with torch.no_grad():
            shown = model(batches[0])
            for route, options_of in (("default", {}), ("script", {"dynamo": False})):
                path = f"{options.output}/{kind}_{route}.onnx"
                with pytorch_quantization.enable_onnx_export():
                    torch.onnx.export(
                        model, batches[0], path, opset_version=13, do_constant_folding=True,
                        **options_of,
                    )
                found = [n.op_type for n in onnx.load(path).graph.node]
                print(kind, route, found.count("QuantizeLinear"), found.count("DequantizeLinear"))
        quant_nn.TensorQuantizer.use_fb_fake_quant = False
        np.savez(f"{options.output}/{kind}.npz", x=batches[0], y=shown, all=torch.stack(batches),
                 amax=model[0]._input_quantizer._amax)


if __name__ == "__main__":
    main()
    sys.exit(7)
"""


@pytest.fixture
def run_compat(not_installed, monkeypatch, tmp_path, capsys):
    """The command in this process, which comes back from it."""
    monkeypatch.chdir(tmp_path)
    for name in ("PYTHONPATH", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    for module in (torch, torch.serialization):
        monkeypatch.setattr(module, "load", torch.load)

    def run(*arguments):
        try:
            code = main(["run-compat", *map(str, arguments)])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_a_program_from_end_to_end(python, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(OLD_PROGRAM)
    command = "-m", "pytorch_quant", "run-compat", script
    code, out, err = python(*command, "--output", tmp_path, "--debug")
    assert code == 7, err
    # Convolution, pooling and linear layer: three inputs and two weights.
    for kind in ("max", "histogram"):
        for route in ("default", "script"):
            assert f"{kind} {route} 5 5\n" in out
            saved = np.load(tmp_path / f"{kind}.npz")
            (got,) = onnx_runs.run(tmp_path / f"{kind}_{route}.onnx", saved["x"])
            np.testing.assert_allclose(got, saved["y"], atol=1e-6)
    magnitudes = np.abs(saved["all"])
    assert np.load(tmp_path / "max.npz")["amax"] == magnitudes.max()
    # The histogram has the range [0, 4) in 2048 bins.
    least = np.percentile(magnitudes, 99.9, method="inverted_cdf")
    assert saved["amax"] == pytest.approx(least, abs=4 / 2048)


SURROUNDINGS = """
import os, pickle, sys
import pytorch_quantization
import beside_the_script
class Own: pass
assert type(pickle.loads(pickle.dumps(Own()))) is Own
assert __name__ == "__main__" and __file__ == os.path.abspath(sys.argv[0]) and __spec__ is None
assert sys.modules["__main__"].Own is Own
assert sys.path[0] == os.path.dirname(os.path.realpath(__file__))
assert "annotations" not in globals()
number: int = 3
assert __annotations__ == {"number": int}  # and not {"number": "int"}
print(sys.argv)
sys.exit(7)
"""


def test_surroundings_and_exit_code(run_compat, tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "beside_the_script.py").write_text("")
    (folder / "s.py").write_text(SURROUNDINGS)
    arguments = ["--help", "-x", "--", "--trust-pickles", "a b"]
    code, out, err = run_compat("scripts/s.py", *arguments)
    assert (code, err) == (7, "")
    assert out == f"{['scripts/s.py', *arguments]}\n"


FAILING = """import pytorch_quantization

def f():
    return {}["missing"]

try:
    1 / 0
except ZeroDivisionError:
    f()
"""


def test_a_traceback_is_that_of_python(python, run_compat, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILING)
    code, out, err = run_compat("fails.py")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "fails.py").write_text(FAILING.replace("import", "import json as", 1))
    wanted = python(plain / "fails.py")[2].replace(str(plain), str(tmp_path))
    assert (code, out, err) == (1, "", wanted)
    assert "KeyError: 'missing'" in err and "ZeroDivisionError" in err


def test_a_syntax_error_and_a_missing_script(python, run_compat, tmp_path):
    (tmp_path / "wrong.py").write_text("x = = 1\n")
    code, _, err = run_compat("wrong.py")
    assert code == 1 and err == python("wrong.py")[2]
    assert "Traceback" not in err and "SyntaxError" in err
    code, _, err = run_compat("none.py")
    assert code == 1 and "none.py" in err and "Traceback" not in err


def test_an_interrupted_script(run_compat, tmp_path):
    (tmp_path / "s.py").write_text("raise KeyboardInterrupt")
    code, _, err = run_compat("s.py")
    assert code == 130 and err.endswith("KeyboardInterrupt\n")


LOADING = """
import pickle
import torch
import pytorch_quantization.nn as quant_nn
torch.save({"model": quant_nn.QuantLinear(3, 2)}, "m.pt")
torch.save({"a": torch.ones(1)}, "state.pt")
assert torch.load("m.pt", weights_only=False)["model"].in_features == 3
assert torch.load("state.pt")["a"] == 1
for arguments in ({"weights_only": True}, {"weights_only": None}, {}):
    try:
        print(len(torch.load("m.pt", map_location="cpu", **arguments)))
    except pickle.UnpicklingError as error:
        print("run-compat --trust-pickles" in str(error))
"""


def test_pickles_need_the_switch(run_compat, tmp_path):
    (tmp_path / "s.py").write_text(LOADING)
    # What the script says itself counts; the switch could not change it.
    assert run_compat("s.py") == (0, "False\nTrue\nTrue\n", "")


def test_pickles_with_the_switch(run_compat, tmp_path):
    (tmp_path / "s.py").write_text(LOADING)
    assert run_compat("--trust-pickles", "s.py") == (0, "False\n1\n1\n", "")


CHILDREN = """
import multiprocessing, subprocess, sys
import pytorch_quantization.nn as quant_nn

def work(queue):
    from pytorch_quantization.tensor_quant import QuantDescriptor
    queue.put(quant_nn.QuantLinear.__name__)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    process.join()
    print(process.exitcode, queue.get(), flush=True)
    subprocess.run([sys.executable, "-c", "import pytorch_quantization as p; print(p.nn)"])
"""


@pytest.mark.slow
def test_processes_that_a_script_starts(python, tmp_path):
    (tmp_path / "s.py").write_text(CHILDREN)
    done = python("-m", "pytorch_quant", "run-compat", "s.py")
    code, out, err = done
    assert (code, err) == (0, "")
    assert out.startswith("0 QuantLinear\n<module 'pytorch_quantization.nn'")


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "run-compat" in capsys.readouterr().out
