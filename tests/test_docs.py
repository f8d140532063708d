"""The pages: blocks run, links lead somewhere, and what they list is complete."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import pytorch_quant
from pytorch_quant import analysis, calib, export, qat

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
WITH_BLOCKS = [p for p in PAGES if BLOCK.search(p.read_text())]
# Pages that train, or that measure latency.
SLOW = {f"docs/{n}.md" for n in ("quick_start", "deploy", "debug_speed", "partial_quantization")}
# What a link looks like that is no path of ours.
ELSEWHERE = re.compile(r"https?:")


def label(page):
    return str(page.relative_to(ROOT))


def marked(page):
    return pytest.param(page, id=label(page), marks=[pytest.mark.slow] * (label(page) in SLOW))


@pytest.mark.parametrize("page", [marked(page) for page in WITH_BLOCKS])
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "page"}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), namespace)


def anchors(page):
    """The anchors of a page, as GitHub and MyST make them of its headings."""
    text = FENCED.sub("", page.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", FENCED.sub("", page.read_text())):
        if ELSEWHERE.match(target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{label(page)} links to {path}"
        if anchor:
            assert anchor in anchors(found), f"{label(page)} links to {target}; no such heading"


def test_every_page_is_in_the_index():
    listed = re.findall(r"^```\{toctree\}\n(.*?)^```", (DOCS / "index.md").read_text(), re.M | re.S)
    names = {line for block in listed for line in block.split("\n") if line[:1].isalpha()}
    pages = {p.relative_to(DOCS).with_suffix("").as_posix() for p in DOCS.rglob("*.md")}
    pages = {name for name in pages if not name.startswith("_build")}
    assert pages - {"index"} == names


@pytest.mark.parametrize("module", [pytorch_quant, qat, analysis, export, calib], ids=str)
def test_every_public_name_is_in_the_reference(module):
    text = "\n".join(p.read_text() for p in (DOCS / "reference").glob("*.md"))
    listed = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto\w+:: (\S+)", text, re.M)}
    modules = {"calib", "nn", "qat", "quant_modules", "tensor_quant", "__version__"}
    assert set(module.__all__) - modules - listed == set()


def test_the_rules_on_the_page_are_those_of_lint():
    tables = runpy.run_path(str(ROOT / "tools" / "lint_rules.py"))["tables"]()
    page = (DOCS / "lint_rules.md").read_text()
    assert page.endswith(tables), "run python tools/lint_rules.py"
    assert {f"| {rule} |" for rule in export.lint.RULES} <= set(
        re.findall(r"^\| \w+ \|", page, re.M)
    )


def test_every_picture_has_its_place():
    drawn = (ROOT / "tools" / "draw_docs.py").read_text()
    names = re.findall(r"^def (\w+)\(\) -> Figure", drawn, re.M)
    shown = "".join(page.read_text() for page in PAGES)
    assert names
    assert [name for name in names if f"images/{name}.svg" not in shown] == []
