"""Einsum equations that are matrix products: which axes are rows, columns, summed, or a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Symbol = str | int
"""A letter of the equation, or an axis under the ellipsis, counted from the right."""


@dataclass(frozen=True)
class MatrixProduct:
    """`(M, K) x (K, N)`, each of them one axis or several, with axes that both factors share.

    Attributes:
        left: The axes of the first factor.
        right: Those of the second.
        result: Those of the result.
    """

    left: tuple[Symbol, ...]
    right: tuple[Symbol, ...]
    result: tuple[Symbol, ...]

    @property
    def summed(self) -> set[Symbol]:
        """The axes that are summed over, K."""
        return (set(self.left) & set(self.right)) - set(self.result)

    @property
    def rows(self) -> set[Symbol]:
        """The axes of the first factor alone, M."""
        return set(self.left) - set(self.right)

    @property
    def columns(self) -> set[Symbol]:
        """The axes of the second factor alone, N."""
        return set(self.right) - set(self.left)

    def size(
        self, axes: set[Symbol], a: Sequence[int | None], b: Sequence[int | None]
    ) -> int | None:
        """The number of entries along some axes of factors with the shapes `a` and `b`.

        None where one is unknown.
        """
        sizes = []
        for axis in axes:
            found = [
                shape[term.index(axis)]
                for term, shape in ((self.left, a), (self.right, b))
                if axis in term
            ]
            known = [size for size in found if size is not None]
            if len(known) < len(found):
                return None
            # An axis of length 1 is broadcast.
            sizes.append(max(known))
        return math.prod(sizes)

    def sizes(
        self, a: Sequence[int | None], b: Sequence[int | None], weight: int | None
    ) -> tuple[int | None, int | None, int | None]:
        """M, K and N; None where a size is unknown or may hold the batch.

        Args:
            a: The shape of the first factor.
            b: That of the second.
            weight: Which factor is constant; N is then the number of its outputs. None if neither
                is: an axis that comes first in its factor may be the batch.
        """
        k = self.size(self.summed, a, b)
        if weight is not None:
            return None, k, self.size(self.columns if weight else self.rows, a, b)
        if not set(self.left) & set(self.right) & set(self.result):
            return None, None, None
        m = None if self.left[0] in self.rows else self.size(self.rows, a, b)
        n = None if self.right[0] in self.columns else self.size(self.columns, a, b)
        return m, k, n


def matrix_product(equation: str, left_rank: int, right_rank: int) -> MatrixProduct | None:
    """The matrix product that an einsum of two factors is; None if it is something else.

    Args:
        equation: As `torch.einsum` and ONNX `Einsum` take it, with or without `->` and ellipses.
        left_rank: The number of axes of the first factor.
        right_rank: That of the second.
    """
    terms, arrow, written = equation.replace(" ", "").partition("->")
    if terms.count(",") != 1:
        return None
    given = terms.split(",")
    left, right = (
        _axes(term, rank) for term, rank in zip(given, (left_rank, right_rank), strict=True)
    )
    if left is None or right is None:
        return None
    hidden = sorted({a for a in (*left, *right) if isinstance(a, int)}, reverse=True)
    if not arrow:
        # Without a result: what the ellipses cover, then each letter that occurs once.
        letters = terms.replace(",", "").replace(".", "")
        written = "..." + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    before, dots, after = written.partition("...")
    result: tuple[Symbol, ...] = (*before, *(hidden if dots else ()), *after)
    product = MatrixProduct(left, right, result)
    repeated = any(len(set(term)) != len(term) for term in (left, right, result))
    kept = product.rows | product.columns
    # An axis of one factor alone that is not in the result is a sum of its own, not a product.
    if repeated or not product.summed or not kept <= set(result):
        return None
    return product if product.rows and product.columns else None


def _axes(term: str, rank: int) -> tuple[Symbol, ...] | None:
    before, dots, after = term.partition("...")
    covered = rank - len(before) - len(after)
    if covered < 0 or (covered and not dots) or not (before + after).isalpha():
        return None
    return (*before, *range(covered - 1, -1, -1), *after)
