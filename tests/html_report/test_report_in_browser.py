"""The page in a headless Chromium: no errors, all sections, nothing wider than the screen."""

import json
import re

import pytest
from page_reader import SECTIONS, browse, browser
from report_models import tiny_models

from pytorch_quant import report

pytestmark = pytest.mark.skipif(browser() is None, reason="needs chromium")

# Measures the layout, which the page itself has no script for.
PROBE = """<!DOCTYPE html><body style="margin:0"><iframe id="f" src="report.html"
 style="width:{width}px;height:900px;border:0"></iframe><pre id="out"></pre><script>
f.onload = () => {{
  const d = f.contentDocument, w = d.documentElement.clientWidth, found = {{}};
  found.dark = f.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches;
  found.page = d.documentElement.scrollWidth - w;
  found.hidden = [...d.querySelectorAll("section")].filter(s => s.offsetHeight < 40).length;
  found.cut = [...d.querySelectorAll("figure, dl div, td, .wide, .legend li")]
    .filter(e => e.scrollWidth > e.clientWidth + 1)
    .map(e => e.outerHTML.slice(0, 80));
  found.overlap = [...d.querySelectorAll(".legend li")].filter(li => {{
    const boxes = [...li.children].map(c => c.getBoundingClientRect());
    return boxes.some((b, i) => i && b.left < boxes[i - 1].right - 1);
  }}).length;
  const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => {{
    v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }});
  const light = c => {{ const [r, g, b] = rgb(c); return 0.2126 * r + 0.7152 * g + 0.0722 * b; }};
  const back = e => {{ for (; e; e = e.parentElement) {{
    const c = f.contentWindow.getComputedStyle(e).backgroundColor;
    if (c !== "rgba(0, 0, 0, 0)") return c; }} return "rgb(255, 255, 255)"; }};
  found.faint = [...d.querySelectorAll("p, td, dt, dd, small, a, code, li b, li span, .mark")]
    .filter(e => {{
      const style = f.contentWindow.getComputedStyle(e);
      const a = light(style.color), b = light(back(e));
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5;
    }}).map(e => e.outerHTML.slice(0, 80));
  out.textContent = JSON.stringify(found);
}};
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("browser")
    plain, model, batches = tiny_models()
    accuracy = {"float": 76.13, "int8": 75.9}
    report(
        model, batches, made / "report.html", float_model=plain, accuracy=accuracy, progress=False
    )
    return made


def test_renders_without_errors(folder):
    document, console = browse(folder / "report.html", folder, "--dump-dom")
    assert console == []
    assert re.findall(r'<section id="(\w+)"', document) == SECTIONS
    assert document.count("<svg") == document.count("<figure") > 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200], ids=["phone", "desk"])
def test_layout(folder, width, dark):
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(width=width))
    options = ["--dump-dom", "--allow-file-access-from-files"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    document, _ = browse(probe, folder, *options, width=max(width, 600))
    (text,) = re.findall(r'<pre id="out">(.*?)</pre>', document)
    found = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found == {
        "dark": dark, "page": 0, "hidden": 0, "cut": [], "overlap": 0, "faint": [],
    }  # fmt: skip


def test_screenshot_at_phone_width(folder):
    picture = folder / "phone.png"
    options = [f"--screenshot={picture}", "--blink-settings=preferredColorScheme=0"]
    browse(folder / "report.html", folder, *options, width=390, height=844)
    image = pytest.importorskip("matplotlib.image")
    pixels = image.imread(picture)[..., :3]
    assert pixels.shape == (844, 390, 3)
    # Mostly the dark background, with text on it.
    assert pixels.mean() < 0.25 and pixels.max() > 0.8
