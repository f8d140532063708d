"""HTML as text that cannot be mistaken for a name: whatever is not `Html` is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class Html(str):
    """Text that is markup already."""


def markup(content: Any) -> Html:
    """`content` as markup; anything but `Html` is escaped."""
    return content if isinstance(content, Html) else Html(html.escape(str(content)))


def joined(parts: Iterable[Any], between: str = "") -> Html:
    """Contents one after the other."""
    return Html(between.join(markup(part) for part in parts))


def tag(tag_name: str, *content: Any, **attributes: Any) -> Html:
    """An element.

    Args:
        tag_name: Such as `td`.
        *content: What is inside.
        **attributes: `class_="bar"` becomes `class="bar"`, `data_value=1` becomes `data-value="1"`;
            None leaves an attribute out.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag_name}{written}>{joined(content)}</{tag_name}>")


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        content: What is shown.
        value: The figure behind it, for programs that read the page; None for a text.
        number: It is flush right.
    """

    content: Any
    value: float | None = None
    number: bool = False


def table(label: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """A table that becomes a list of cards on a narrow screen.

    Roles are written out, as a table that is displayed as blocks loses its own.

    Args:
        label: What it shows, for screen readers.
        header: Titles of the columns; on a narrow screen they stand in front of each value.
        rows: Contents, or `Cell`.
    """
    titles = (tag("th", title, scope="col", role="columnheader") for title in header)
    body = []
    for row in rows:
        cells = []
        for title, held in zip(header, row, strict=True):
            cell = held if isinstance(held, Cell) else Cell(held)
            cells.append(
                tag(
                    "td",
                    cell.content,
                    role="cell",
                    data_label=title,
                    class_="number" if cell.number else None,
                    data_value=None if cell.value is None else repr(cell.value),
                )
            )
        body.append(tag("tr", *cells, role="row"))
    head = tag("thead", tag("tr", *titles, role="row"), role="rowgroup")
    parts = head, tag("tbody", *body, role="rowgroup")
    return tag("div", tag("table", *parts, role="table", aria_label=label), class_="wide")


def code(name: Any) -> Html:
    """A name, which may break after its dots and slashes."""
    parts = re.split(r"(?<=[./])", str(name))
    return tag("code", joined(parts, "<wbr>"))
