"""The command line as a whole: usage, failures, interrupts, what goes to which stream."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytorch_quant import cli
from pytorch_quant.commands import COMMANDS

NAMES = [name.replace("_", "-") for name in COMMANDS]


@pytest.fixture
def run(capsys):
    def run(*words):
        try:
            code = cli.main([*map(str, words)])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def test_as_a_module():
    command = [sys.executable, "-W", "error", "-m", "pytorch_quant", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert all(f"\n    {name}" in done.stdout for name in NAMES)
    assert "130" in done.stdout


@pytest.mark.parametrize("name", [*COMMANDS, "arguments"])
def test_commands_import_what_they_need_when_they_run(name):
    path = Path(cli.__file__).parent / "commands" / f"{name}.py"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            light = (
                module.startswith("pytorch_quant.commands.") or module in sys.stdlib_module_names
            )
            assert light or module == "collections.abc", f"{name} imports {module} at its top"


@pytest.mark.parametrize("name", NAMES)
def test_help_has_an_example_and_exit_codes(run, name):
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert f"example:\n  pytorch-quant {name} " in out
    assert "exit codes:\n" in out and "130" in out
    assert max(map(len, out.splitlines())) <= 100


def test_wrong_usage(run):
    for words in ([], ["demmo"], ["lint"], ["lint", "m.onnx", "--targte", "openvino"]):
        code, out, err = run(*words)
        assert code == 2 and out == "" and err.startswith("usage: ")


@pytest.fixture
def demo(monkeypatch):
    """Puts a function in the place of the demonstration."""

    def put(function):
        monkeypatch.setattr("pytorch_quant.demo.run_demo", lambda folder, quick: function())

    return put


def raising(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("one\n  and two"), "one and two"),
        (KeyError("key"), "KeyError: 'key'"),
        (FileNotFoundError(2, "No such file", "x.onnx"), "x.onnx: No such file"),
        (RuntimeError(), "RuntimeError"),
        (ValueError("long " * 400), f"{('long ' * 120)}... (all of it with --debug)"),
    ],
)
def test_a_failure_is_one_line(run, demo, error, shown):
    demo(raising(error))
    assert run("demo") == (1, "", f"pytorch-quant demo: {shown}\n")
    code, out, err = run("demo", "--json")
    assert code == 1 and err == f"pytorch-quant demo: {shown}\n"
    told = {"type": type(error).__name__, "message": shown}
    assert json.loads(out) == {"command": "demo", "error": told}


@pytest.mark.parametrize("words", [("--debug", "demo"), ("demo", "--debug")])
def test_debug_shows_the_traceback(run, demo, words):
    demo(raising(ValueError("why")))
    with pytest.raises(ValueError, match="why"):
        run(*words)


def test_an_interrupt(run, demo):
    demo(raising(KeyboardInterrupt()))
    assert run("demo", "--json") == (130, "", "interrupted\n")


@pytest.mark.parametrize("words", [("--json", "demo"), ("demo", "--json")])
def test_json_alone_goes_to_stdout(run, demo, words):
    @dataclass
    class Result:
        score: float

    def printing():
        print("chatter")
        return Result(float("inf"))

    demo(printing)
    code, out, err = run(*words)
    assert (code, err) == (0, "chatter\n")
    assert json.loads(out) == {"command": "demo", "score": None}


def test_the_output_of_a_script_is_its_own(run):
    code, out, err = run("--json", "run-compat", "s.py")
    assert code == 2 and out == "" and "run-compat has no --json" in err


def test_a_reader_that_has_seen_enough(demo, monkeypatch, capsys):
    demo(lambda: "x" * 10**6)
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["demo"]) == 0
        monkeypatch.undo()
    assert capsys.readouterr().err == ""
