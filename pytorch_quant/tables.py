"""Rows of text as a table with aligned columns, for reports."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], right: int = 0) -> list[str]:
    """A line for each row, columns two spaces apart.

    Args:
        rows: All of one length, the header first.
        right: How many of the last columns are flush right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first_right = len(widths) - right
    return [
        "  ".join(
            cell.ljust(width) if i < first_right else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
