"""Run the tests in one environment after another, and write docs/support.md.

    python tools/matrix.py                      the whole suite in every row, one at a time
    python tools/matrix.py floor newest         these rows alone; the others stay in the page
    python tools/matrix.py --contract floor     the tests marked `contract` (minutes)
    python tools/matrix.py --list               the rows

Each row is a virtual environment in a temporary folder, with the versions that the table below
pins and the newest of everything else. It takes 5 to 7 GB and is removed before the next one. An
interpreter is looked for on the PATH by its version; where it is missing, the one that runs this
file serves, and the page says so.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "support.md"
RESULTS = ROOT / "docs" / "support.json"
SHOWN = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy", "scipy")


@dataclass(frozen=True)
class Row:
    """One environment.

    Attributes:
        name: What the command line calls it.
        python: The interpreter, `3.11`.
        pins: Requirements beyond those of setup.cfg.
        oldest: Install what setup.cfg gives as the lowest version of each dependency.
        why: What the row is there for.
    """

    name: str
    python: str
    pins: tuple[str, ...] = ()
    oldest: bool = False
    why: str = ""


ROWS = (
    Row(
        "floor",
        "3.10",
        ("torch==2.8.0", "torchvision==0.23.0"),
        why="the oldest torch that setup.cfg admits",
    ),
    Row("2.10", "3.11", ("torch==2.10.0", "torchvision==0.25.0"), why="between"),
    Row("2.12", "3.12", ("torch==2.12.1", "torchvision==0.27.1"), why="between"),
    Row("resolved", "3.11", why="what `pip install` resolves with torchvision"),
    Row(
        "newest",
        "3.13",
        ("torch==2.15.0",),
        why="the newest torch and Python, torchvision or not",
    ),
)


@dataclass
class Result:
    """What a row did.

    Attributes:
        lane: `suite` or `contract`.
        python: The version that ran.
        versions: Of the packages that are shown.
        passed, failed, skipped: Tests.
        failures: The names of those that failed.
        seconds: Of the tests alone.
        day: When.
    """

    lane: str
    python: str
    versions: dict[str, str]
    passed: int
    failed: int
    skipped: int
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    day: str = ""


def lowest_versions(setup: Path = ROOT / "setup.cfg") -> list[str]:
    """`package==version` for what the package runs with and setup.cfg has a lowest version of."""
    parser = configparser.ConfigParser()
    parser.read(setup)
    extras = parser["options.extras_require"]
    lines = parser["options"]["install_requires"].split() + extras["onnxruntime"].split()
    pins = {}
    for line in lines:
        found = re.fullmatch(r"([\w.-]+)>=([\w.]+)", line)
        if found:
            pins[found[1]] = found[2]
    return [f"{name}=={version}" for name, version in pins.items()]


def interpreter(version: str) -> str:
    """An interpreter of this version on the PATH, else the one that is running."""
    for folder in os.get_exec_path():
        command = shutil.which(f"python{version}", path=folder)
        if command is None:
            continue
        # Version managers leave a stand-in there that fails where the version is not chosen.
        asked = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
        if asked.returncode == 0 and asked.stdout.startswith(f"Python {version}."):
            return command
    return sys.executable


def install(row: Row, folder: Path) -> Path:
    """Make the environment of a row in `folder`; returns its interpreter.

    Raises:
        CalledProcessError: pip found no versions that fit.
    """
    subprocess.run([interpreter(row.python), "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    pins = [*row.pins]
    if row.oldest:
        named = {pin.split("==")[0] for pin in pins}
        pins += [pin for pin in lowest_versions() if pin.split("==")[0] not in named]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n")
    # pip before 24 takes minutes over what it cannot resolve.
    run_pip = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*run_pip, "--upgrade", "pip"], check=True)
    wanted = f"{ROOT}[dev]"
    subprocess.run([*run_pip, "-c", constraints, "-e", wanted], check=True)
    return python


def versions_in(python: Path) -> dict[str, str]:
    """The versions of the packages that are shown, of those that are installed."""
    code = (
        "import importlib.metadata as m, json\n"
        f"names = {SHOWN!r}\n"
        "print(json.dumps({d.metadata['Name'].lower(): d.version for d in m.distributions()\n"
        "                  if d.metadata['Name'].lower() in names}))"
    )
    output = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    found = json.loads(output)
    return {name: found[name] for name in SHOWN if name in found}


def run_tests(python: Path, folder: Path, contract: bool) -> Result:
    """Run the suite, or its contract lane, with the interpreter of an environment."""
    report = folder / "report.xml"
    lane = ["-m", "contract"] if contract else []
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *lane]
    report.unlink(missing_ok=True)
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, check=False)
    seconds = time.monotonic() - started
    if not report.exists():
        raise RuntimeError(f"pytest ended with {done.returncode} and wrote no report")
    passed, skipped, failures = counted(report)
    if done.returncode and not failures:
        failures = [f"pytest ended with {done.returncode}"]
    version = subprocess.run(
        [python, "-c", "import platform; print(platform.python_version())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return Result(
        lane="contract" if contract else "suite",
        python=version,
        versions=versions_in(python),
        passed=passed,
        failed=len(failures),
        skipped=skipped,
        failures=failures,
        seconds=round(seconds, 1),
        day=date.today().isoformat(),
    )


def counted(report: Path) -> tuple[int, int, list[str]]:
    """Passed and skipped tests, and the names of those that failed, of a JUnit report."""
    passed, skipped, failures = 0, 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            skipped += 1
        else:
            passed += 1
    return passed, skipped, failures


def page(results: dict[str, Result], limits: Sequence[tuple[str, str, str]]) -> str:
    """docs/support.md as text.

    Args:
        results: By the name of their row.
        limits: What an older torch cannot do, from which version on, and what helps.
    """
    lines = [
        "# Supported versions",
        "",
        "What the tests have run on. `python tools/matrix.py` makes each environment afresh, runs",
        "the tests there, and writes this page. A torch newer than any of these works as far as",
        "torch keeps its promises; the first import says once that it has not been tested.",
        "",
        "| row | Python | " + " | ".join(SHOWN) + " | tests | passed | failed | skipped | date |",
        "|---|---|" + "---|" * len(SHOWN) + "---|---:|---:|---:|---|",
    ]
    for row in ROWS:
        result = results.get(row.name)
        if result is None:
            lines.append(
                f"| {row.name} | {row.python} |" + " |" * len(SHOWN) + " not run | | | | |"
            )
            continue
        cells = [row.name, result.python, *(result.versions.get(n, "-") for n in SHOWN)]
        cells += [result.lane, *map(str, (result.passed, result.failed, result.skipped))]
        lines.append("| " + " | ".join([*cells, result.day]) + " |")
    lines += ["", *(f"- **{row.name}**: {row.why}." for row in ROWS), ""]
    lines += [
        "`suite` is every test, `contract` those that have to hold on every torch: numerics,",
        "`torch.compile`, both exporters, `quantize`, old programs, and checkpoints.",
        "Skipped tests need a CUDA device, TensorRT, or torchvision beside a torch that it is not",
        "built for.",
        "",
        "## What an older torch cannot do",
        "",
        "| what | from torch | on an older one |",
        "|---|---|---|",
        *(f"| {what} | {since} | {instead} |" for what, since, instead in limits),
        "",
        "## Try yours",
        "",
        "In a checkout, beside the torch that you have:",
        "",
        "```sh",
        'pip install -e ".[dev]" && python -m pytest -m contract',
        "```",
        "",
    ]
    failed = {name: r.failures for name, r in results.items() if r.failures}
    if failed:
        lines += ["## Failures", ""]
        lines += [f"- {name}: `{test}`" for name, tests in failed.items() for test in tests]
        lines.append("")
    return "\n".join(lines)


def load() -> dict[str, Result]:
    """The results that were written before, by row."""
    if not RESULTS.exists():
        return {}
    return {name: Result(**entry) for name, entry in json.loads(RESULTS.read_text()).items()}


def save(results: dict[str, Result]) -> None:
    """Write the results and the page."""
    order = {row.name: i for i, row in enumerate(ROWS)}
    known = {n: results[n] for n in sorted(results, key=lambda n: order.get(n, 99)) if n in order}
    RESULTS.write_text(json.dumps({n: asdict(r) for n, r in known.items()}, indent=1) + "\n")
    PAGE.write_text(page(known, limits()))


def limits() -> list[tuple[str, str, str]]:
    """The rows of `pytorch_quant.versions.LIMITS`, read without importing torch."""
    module = ast.parse((ROOT / "pytorch_quant" / "versions.py").read_text())
    (value,) = (
        node.value
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LIMITS"
    )
    rows = ast.literal_eval(value)
    return [(what, ".".join(map(str, since)), instead) for what, since, instead in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run rows; returns 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [row.name for row in ROWS]
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(names)}; all")
    parser.add_argument("--contract", action="store_true", help="the tests marked contract alone")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--no-page", action="store_true", help="leave docs/support.md as it is")
    options = parser.parse_args(arguments)
    unknown = set(options.rows) - set(names)
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; rows are {', '.join(names)}")
    if options.list:
        for row in ROWS:
            print(f"{row.name:10} Python {row.python}  {' '.join(row.pins) or '-':40} {row.why}")
        return 0
    failed = False
    for row in ROWS:
        if options.rows and row.name not in options.rows:
            continue
        print(f"== {row.name}: Python {row.python}, {' '.join(row.pins) or 'no pins'}", flush=True)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            python = install(row, folder / "environment")
            shown = ", ".join(f"{n} {v}" for n, v in versions_in(python).items())
            print(f"== resolved: {shown}", flush=True)
            result = run_tests(python, folder, options.contract)
        failed |= bool(result.failed)
        print(
            f"== {row.name}: {result.passed} passed, {result.failed} failed, "
            f"{result.skipped} skipped in {result.seconds:.0f} s",
            flush=True,
        )
        if not options.no_page:
            save({**load(), row.name: result})
    return int(failed)


if __name__ == "__main__":
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    sys.exit(main())
