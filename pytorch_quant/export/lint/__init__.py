"""`lint_onnx`: where a Q/DQ file breaks the rules of the runtime it is meant for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pytorch_quant.export.lint import (  # noqa: F401  (each enters its rules into the table)
    attention,
    cpu,
    float_layers,
    formats,
    joins,
    placement,
    regions,
    weights,
    well_formed,
)
from pytorch_quant.export.lint.finding import NOT_CHECKED, RULES, Finding, Rule
from pytorch_quant.export.lint.graph import open_graph
from pytorch_quant.export.targets import check_target

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["NOT_CHECKED", "RULES", "Finding", "Rule", "check_target", "lint_onnx"]

_FAMILIES = "ROFWLHX"


def lint_onnx(path: str | os.PathLike[str] | ModelProto, target: str = "tensorrt") -> list[Finding]:
    """Check a Q/DQ ONNX file against the rules of a runtime.

    The rules are those of `RULES`; each names its sources. External data is read as far as a rule
    needs it. Nothing is changed.

    Args:
        path: The file, or a model in memory. External data of a model in memory that was not loaded
            is unknown, and rules about its values say nothing.
        target: `"tensorrt"` for all rules; `"onnxruntime"` or `"openvino"` for those that hold
            there.

    Returns:
        The findings, in the order of the rules and then of the nodes.

    Raises:
        OSError: the file or its external data is missing or cannot be read.
        ValueError: the file is no ONNX model, or its nodes are not in order; an unknown target.
    """
    check_target(target)
    graph = open_graph(path, target)
    findings = []
    for rule in sorted(RULES.values(), key=_place):
        if target not in rule.targets:
            continue
        for problem in rule.check(graph):
            node: Any = problem.node
            findings.append(
                Finding(
                    rule.id,
                    problem.severity or rule.severities[0],
                    node if isinstance(node, str) else node.name,
                    problem.message,
                    problem.fix,
                )
            )
    return findings


def _place(rule: Rule) -> tuple[int, int]:
    return _FAMILIES.index(rule.id[0]), int(rule.id[1:])
