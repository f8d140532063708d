"""The command line as a whole: usage, failures, interrupts, what goes to which stream."""

import ast
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytorch_quant import cli
from pytorch_quant.commands import COMMANDS

# The package may be on the path of this process alone.
PLACES = (str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, PLACES))}
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


@pytest.mark.slow
def test_as_a_module():
    command = [sys.executable, "-W", "error", "-m", "pytorch_quant", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
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


@pytest.mark.parametrize("name", NAMES)
def test_the_words_of_an_example_are_known(run, name):
    _, out, _ = run(name, "--help")
    example = out.partition("example:\n")[2].partition("\n\n")[0].replace("\\\n", " ")
    commands = [shlex.split(line) for line in example.splitlines()]
    assert commands
    for program, *words in commands:
        assert program == "pytorch-quant"
        assert callable(cli._parser().parse_args(words).run)


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


@pytest.fixture
def interruptible():
    """Python's own handler of Ctrl-C, which it does not set up in a shell's background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_that_others_turn_into_an_error(run, demo):
    def exporting():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise RuntimeError("half an import") from None

    demo(exporting)
    before = signal.getsignal(signal.SIGINT)
    assert run("demo") == (130, "", "interrupted\n")
    assert run("demo", "--debug") == (130, "", "interrupted\n")

    def going_on():
        with pytest.raises(RuntimeError):
            exporting()
        return "a page without the export"

    demo(going_on)
    assert run("demo") == (130, "", "interrupted\n")
    assert signal.getsignal(signal.SIGINT) is before


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


@pytest.mark.slow
def test_other_processes_do_not_print_into_json(tmp_path):
    (tmp_path / "noisy.py").write_text(
        "import os, torch\n"
        "def build():\n"
        "    os.system('echo from a process')\n"
        "    return torch.nn.Linear(2, 2)\n"
    )
    words = ["summary", "noisy.py:build", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "pytorch_quant", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
    )
    assert json.loads(done.stdout)["command"] == "summary"
    assert done.stderr == "from a process\n"


def test_a_terminal_that_knows_ascii_alone(demo, monkeypatch):
    demo(lambda: "modèle.onnx")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli.main(["demo"]) == 0
    assert shown.buffer.getvalue() == b"mod\\xe8le.onnx\n"


def test_a_full_disk_is_a_failure(demo, monkeypatch, capsys):
    demo(lambda: "text")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["demo"]) == 1
        monkeypatch.undo()
    assert "No space left" in capsys.readouterr().err


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
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["--help"])
        assert stopped.value.code == 0
        monkeypatch.undo()
    assert capsys.readouterr().err == ""
