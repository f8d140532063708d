"""Running an unmodified script with the alias installed."""

from __future__ import annotations

import builtins
import io
import os
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType

from pytorch_quant.compat.alias import install_as_pytorch_quantization
from pytorch_quant.compat.checkpoints import patch_torch_load

_ON_PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "on_path")


def run_script(script: str, arguments: Sequence[str], *, trust_pickles: bool = False) -> int:
    """Run a script as `__main__`, as `python script arguments...` would, with the alias.

    Takes the process over: its `sys.argv`, `sys.path[0]` and `__main__` stay those of the script,
    for its threads and exit handlers. Processes that the script starts find the alias too.

    Args:
        script: Path of the script.
        arguments: The rest of its command line.
        trust_pickles: Let its `torch.load` calls load any pickle.

    Returns:
        The exit code: 0; 1 after an exception that was shown; 130 after Ctrl-C.

    Raises:
        OSError: the script cannot be read.
        SystemExit: the script exits.
    """
    path = os.path.abspath(script)
    with io.open_code(path) as file:
        source = file.read()
    install_as_pytorch_quantization()
    patch_torch_load(trust_pickles)
    sys.argv = [script, *arguments]
    sys.path[0:1] = [os.path.dirname(os.path.realpath(path)), _ON_PATH]
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([_ON_PATH, *([inherited] if inherited else [])])
    module = ModuleType("__main__")
    module.__dict__.update(
        __builtins__=builtins, __file__=path, __loader__=SourceFileLoader("__main__", path)
    )
    sys.modules["__main__"] = module
    try:
        # dont_inherit: the future statements of this file are not the script's.
        exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        trace = _without_own_frames(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _without_own_frames(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace
