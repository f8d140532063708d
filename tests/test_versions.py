import subprocess
import sys
import warnings

import pytest
import torch

from pytorch_quant import versions


def test_parsed():
    assert versions.parsed("2.14.1+cu130") == (2, 14)
    assert versions.parsed("2.8.0") == (2, 8)
    assert versions.parsed("3.0.0a0+git123") == (3, 0)
    assert versions.parsed("unknown") == (0, 0)
    assert versions.parsed(torch.__version__) == versions.TORCH


def test_a_newer_torch_is_warned_of():
    with pytest.warns(UserWarning, match=r"torch 9\.1\.0 is newer than .*docs/support\.md"):
        versions.warn_of_untested("9.1.0")
    major, minor = versions.NEWEST_TESTED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tested in ("2.8.0", f"{major}.{minor}.7+cpu", "unknown"):
            versions.warn_of_untested(tested)


@pytest.mark.parametrize(("version", "warned"), [("99.0.0", 1), (None, 0)])
def test_the_warning_comes_once_at_import(version, warned):
    program = (
        "import warnings, torch\n"
        f"torch.__version__ = {version!r} or torch.__version__\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import pytorch_quant\n"
        "    import pytorch_quant.export\n"
        "print(sum('docs/support.md' in str(w.message) for w in seen))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert int(output) == warned


def test_the_sentence_for_what_an_older_torch_cannot():
    said = versions.needs("an opset below 18", (2, 9), "pass 18")
    assert said == (
        f"an opset below 18 needs torch 2.9 or newer, and this is {torch.__version__}; pass 18"
    )
