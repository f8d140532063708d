"""Write the table of rules in docs/lint_rules.md from `lint_onnx` itself.

python tools/lint_rules.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from pytorch_quant.export.lint import NOT_CHECKED, RULES
from pytorch_quant.files import written_aside

PAGE = Path(__file__).parent.parent / "docs" / "lint_rules.md"
FAMILIES = {
    "R": "Well-formed Q and DQ",
    "O": "Operator sets",
    "F": "Formats",
    "W": "Weights and biases",
    "L": "Placement",
    "H": "Better left float",
    "X": "Integer kernels of CPUs",
}
_ALL = ("tensorrt", "onnxruntime", "openvino")
_NAMES = {"tensorrt": "TensorRT", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def tables() -> str:
    """The tables as Markdown, one for each family of rules."""
    lines = []
    for letter, title in FAMILIES.items():
        rules = sorted(
            (rule for rule in RULES.values() if rule.id[0] == letter), key=lambda r: int(r.id[1:])
        )
        lines += [
            f"## {title}",
            "",
            "| rule | | severity | holds for | more |",
            "|---|---|---|---|---|",
        ]
        for rule in rules:
            targets = "all" if rule.targets == _ALL else ", ".join(map(_NAMES.get, rule.targets))
            more = _details(rule.check.__doc__ or "")
            lines.append(
                f"| {rule.id} | {rule.title} | {', '.join(rule.severities)} | {targets} | {more} |"
            )
        for id, why in NOT_CHECKED.items():
            if id[0] == letter:
                lines.append(f"| {id} | not checked | | | {why} |")
        lines.append("")
    return "\n".join(lines)


def _details(docstring: str) -> str:
    """What a rule says beside its id, severity and sources, on one line of a table."""
    text = " ".join(inspect.cleandoc(docstring).split())
    text = re.sub(r"^[A-Z]\d+, [a-z ]+(\([^)]*\))?[.:,;]?\s*", "", text)
    # Sources are numbered in the code alone.
    text = re.sub(r"\s*\(S\d[^)]*\)", "", text)
    text = text[:1].upper() + text[1:].replace("which S6 does", "which ModelOpt does")
    return text.replace("|", "\\|")


def main() -> None:
    """Replace everything from the first table on."""
    head = PAGE.read_text().partition("\n## ")[0]
    with written_aside(PAGE) as aside:
        aside.write_text(f"{head}\n{tables()}")


if __name__ == "__main__":
    main()
