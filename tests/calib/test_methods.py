import pytest
import torch

from pytorch_quant.calib import Histogram, entropy_amax, lp_amax, methods, mse_amax, percentile_amax
from pytorch_quant.calib.methods import METHODS, SEARCH_METHODS, search_amax
from pytorch_quant.formats import FloatFormat, IntFormat

SEARCHES = {
    "percentile": lambda h, fmt: percentile_amax(h.counts, h.width, 99.9, maximum=h.maximum),
    "mse": lambda h, fmt: mse_amax(h.counts, h.width, fmt, start_bin=9, maximum=h.maximum),
    "entropy": lambda h, fmt: entropy_amax(h.counts, h.width, fmt, start_bin=9, maximum=h.maximum),
    "lp": lambda h, fmt: lp_amax(h.counts, h.width, fmt, 3.0, start_bin=9, maximum=h.maximum),
}


def histograms():
    """Several sizes and formats, in an order that mixes them."""
    made = []
    for i in range(9):
        histogram = Histogram((512, 300)[i % 2], channels=(1, 5)[i % 3 == 1])
        rows = torch.randn(histogram.channels, 4000) * 3.0**i
        histogram.update(rows if histogram.channels > 1 else rows[0])
        made.append(histogram)
    formats = [IntFormat(8), IntFormat(4), IntFormat(8), FloatFormat(4, 3), IntFormat(4)] * 2
    return made, formats[:9]


@pytest.mark.parametrize("method", SEARCH_METHODS)
@pytest.mark.parametrize("rows", [1024, 2])
def test_one_search_for_many_histograms(method, rows, monkeypatch, device):
    monkeypatch.setattr(methods, "_ROWS", rows)
    made, formats = histograms()
    expected = [SEARCHES[method](h, f) for h, f in zip(made, formats, strict=True)]
    if device.type != "cpu":
        made = [Histogram.from_state({k: v.to(device) for k, v in h.state().items()}) for h in made]
    found = search_amax(made, formats, method, percentile=99.9, start_bin=9, p=3.0)
    for amax, single in zip(found, expected, strict=True):
        assert amax.device.type == device.type
        assert torch.equal(amax.cpu(), single)


def test_no_histograms():
    assert search_amax([], [], "mse") == []


def test_every_method_is_described():
    for method in METHODS:
        assert f"| `{method}` |" in methods.__doc__
