"""The matrix tool, but for making environments, which takes gigabytes."""

import json
import sys
from pathlib import Path

import pytest

from pytorch_quant import versions

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def matrix(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import matrix

    return matrix


REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one"/>
<testcase classname="tests.a" name="two"><failure message="no"/></testcase>
<testcase classname="tests.a" name="three"><skipped message="gpu"/></testcase>
<testcase classname="tests.b" name="four"><error message="no"/></testcase>
</testsuite></testsuites>"""


def test_counts(matrix, tmp_path):
    (tmp_path / "r.xml").write_text(REPORT)
    assert matrix.counted(tmp_path / "r.xml") == (1, 1, ["tests.a::two", "tests.b::four"])


def test_lowest_versions(matrix, tmp_path):
    setup = tmp_path / "setup.cfg"
    setup.write_text(
        "[options]\ninstall_requires =\n    torch>=2.8\n    tqdm\n    onnx>=1.18\n"
        "[options.extras_require]\nonnxruntime =\n    onnxruntime>=1.20\ndev =\n    pytest\n"
    )
    assert matrix.lowest_versions(setup) == ["torch==2.8", "onnx==1.18", "onnxruntime==1.20"]


def test_the_floor_is_that_of_setup_cfg(matrix):
    lowest = dict(pin.split("==") for pin in matrix.lowest_versions())
    floor = matrix.ROWS[0]
    assert f"torch=={lowest['torch']}.0" in floor.pins
    assert {"numpy", "scipy", "onnx", "onnxscript", "onnxruntime"} <= set(lowest)


def test_the_page_holds_every_row(matrix, monkeypatch, tmp_path):
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "support.md")
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "support.json")
    result = matrix.Result(
        "contract", "3.11.7", {"torch": "2.8.0"}, 5, 1, 2, ["tests.a::two"], 9.0, "2026-12-01"
    )
    matrix.save({"floor": result})
    matrix.save({**matrix.load(), "2.10": result})
    page = (tmp_path / "support.md").read_text()
    assert "| floor | 3.11.7 | 2.8.0 | - |" in page and "| contract | 5 | 1 | 2 |" in page
    assert "- 2.10: `tests.a::two`" in page
    assert sum("not run" in line for line in page.splitlines()) == len(matrix.ROWS) - 2
    for what, since, instead in versions.LIMITS:
        assert f"| {what} | {'.'.join(map(str, since))} | {instead} |" in page
    assert list(json.loads((tmp_path / "support.json").read_text())) == ["floor", "2.10"]


def test_an_unknown_row_is_refused(matrix, capsys):
    with pytest.raises(SystemExit) as ended:
        matrix.main(["2.7"])
    assert ended.value.code == 2 and "no row 2.7; rows are floor, 2.10" in capsys.readouterr().err
    assert matrix.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(matrix.ROWS)


def test_interpreters(matrix):
    assert matrix.interpreter("1.4") == sys.executable


def test_the_newest_row_is_the_newest_that_import_does_not_warn_of(matrix):
    newest = next(row for row in matrix.ROWS if row.name == "newest")
    (pin,) = newest.pins
    assert versions.parsed(pin.split("==")[1]) == versions.NEWEST_TESTED
