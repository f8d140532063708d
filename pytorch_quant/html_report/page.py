"""The page: one file that needs nothing else."""

from __future__ import annotations

import time

from pytorch_quant.html_report import deployment, sections
from pytorch_quant.html_report.gathered import Gathered
from pytorch_quant.html_report.markup import Html, joined, markup, tag
from pytorch_quant.html_report.style import STYLE

# Whatever a name holds: nothing is loaded and nothing runs.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(found: Gathered) -> str:
    """The whole HTML document."""
    parts = [
        ("accuracy", "Accuracy", sections.accuracy(found)),
        ("size", "Size and latency", sections.size_and_latency(found)),
        ("layers", "Layers", sections.layers(found)),
        ("exclude", "What to leave in float", sections.exclude(found)),
        ("tensors", "Tensors", sections.tensors(found)),
        ("activations", "Activations", sections.histograms(found, weights=False)),
        ("weights", "Weights", sections.histograms(found, weights=True)),
        ("placement", "Placement", deployment.placement(found)),
        ("prediction", "Predicted int8", deployment.prediction(found)),
        ("lint", "Lint", deployment.lint(found)),
    ]
    title = f"Quantization of {found.model}"
    links = tag(
        "nav",
        *(tag("a", name, href=f"#{anchor}") for anchor, name, _ in parts),
        aria_label="Sections",
    )
    made = f"{found.versions}; {found.errors.batches} batch(es); {time.strftime('%Y-%m-%d %H:%M')}"
    body = [
        tag("header", tag("h1", title), tag("p", made, class_="soft")),
        links,
        tag("main", sections.facts(found), *(_section(*part) for part in parts)),
    ]
    head = joined(
        [
            Html('<meta charset="utf-8">'),
            Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html('<meta name="color-scheme" content="light dark">'),
            tag("title", title),
            tag("style", Html(STYLE)),
        ],
        "\n",
    )
    content = markup(joined(body, "\n"))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n'
        f"<body>\n{content}\n</body>\n</html>\n"
    )


def _section(anchor: str, title: str, content: Html) -> Html:
    heading = tag("h2", title, id=f"{anchor}-title")
    return tag("section", heading, content, id=anchor, aria_labelledby=f"{anchor}-title")
