"""What a rule is, what it finds, and the table that all rules stand in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_quant.export.lint.graph import Graph, Node

SEVERITIES = ("error", "warning", "performance")
TENSORRT = ("tensorrt",)


@dataclass(frozen=True)
class Finding:
    """One place in a file that breaks a rule.

    Attributes:
        rule: Its id, such as `L4`.
        severity: `error` (the build fails, or the result is wrong), `warning` (accepted by some
            versions, or silently changed) or `performance`.
        node: Name of the ONNX node; its type and first output where it has no name.
        message: What was found.
        fix: What to do.
    """

    rule: str
    severity: str
    node: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.rule} {self.severity}: {self.node}: {self.message}; {self.fix}"


@dataclass(frozen=True)
class Problem:
    """What a rule yields; `severity` None means the first one of the rule."""

    node: Node | str
    message: str
    fix: str
    severity: str | None = None


Check = Callable[["Graph"], Iterator[Problem]]


@dataclass(frozen=True)
class Rule:
    """One row of the table of rules.

    Attributes:
        id: Such as `L4`.
        check: Yields the problems of a graph.
        severities: The severity, or several where it depends on the case.
        title: One line.
        targets: The runtimes it is meant for.
    """

    id: str
    check: Check
    severities: tuple[str, ...]
    title: str
    targets: tuple[str, ...]


RULES: dict[str, Rule] = {}

# Rules of the table that a file cannot break, and why.
NOT_CHECKED = {"H7": "it is about DLA, where Q/DQ goes everywhere; there is no such target"}


def rule(
    id: str, *severities: str, title: str, targets: tuple[str, ...] = TENSORRT
) -> Callable[[Check], Check]:
    """Enter the decorated function into `RULES`."""

    def enter(check: Check) -> Check:
        RULES[id] = Rule(id, check, severities, title, targets)
        return check

    return enter
