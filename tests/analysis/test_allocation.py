import itertools

import numpy as np
import pytest

from pytorch_quant.analysis.allocation import allocate, front, total


def drawn(seed, layers=5, options=4, scale=1.0):
    """Cheaper options have larger errors, as a rule."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(layers):
        weights = float(rng.integers(1, 1000))
        found.append(
            [
                {
                    "size": weights * bits,
                    "bops": weights * bits * float(rng.integers(1, 9)),
                    "error": scale * float(rng.lognormal(-bits, 1.5)) * (bits < 32),
                }
                for bits in (4, 8, 16, 32)[:options]
            ]
        )
    return found


def enumerated(options, objective, limits):
    best = None
    for chosen in itertools.product(*(range(len(layer)) for layer in options)):
        sums = {
            key: sum(layer[i][key] for layer, i in zip(options, chosen, strict=True))
            for key in ("size", "bops", "error")
        }
        fits = all(sums[key] <= limit for key, limit in limits.items())
        if fits and (best is None or sums[objective] < best):
            best = sums[objective]
    return best


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e6])
@pytest.mark.parametrize("seed", range(4))
def test_optimum_equals_that_of_all_assignments(seed, scale):
    options = drawn(seed, scale=scale)
    least = sum(min(o["size"] for o in layer) for layer in options)
    for limits in (
        {"size": least},
        {"size": 1.7 * least},
        {"size": 3 * least, "bops": 12 * least},
    ):
        chosen = allocate(options, "error", limits)
        best = enumerated(options, "error", limits)
        if best is None:
            assert chosen is None
            continue
        assert all(total(options, chosen, key) <= limit for key, limit in limits.items())
        assert total(options, chosen, "error") == pytest.approx(best, rel=1e-9)
    limits = {"error": 0.2 * sum(layer[0]["error"] for layer in options)}
    chosen = allocate(options, "size", limits)
    assert total(options, chosen, "size") == enumerated(options, "size", limits)
    assert total(options, chosen, "error") <= limits["error"]


def test_nothing_to_assign_and_nothing_that_fits():
    assert allocate([], "error", {"size": 0.0}) == []
    options = drawn(0)
    assert allocate(options, "error", {"size": 0.5}) is None
    exact = [[{"error": 0.0, "size": 3.0}], [{"error": 0.0, "size": 4.0}]]
    assert allocate(exact, "error", {"size": 7.0}) == [0, 0]
    assert allocate(exact, "error", {"size": 6.999999}) is None


def test_no_point_of_the_front_is_beaten():
    options = drawn(7)
    points = front(options, "size", "error", 10)
    sums = [(total(options, c, "size"), total(options, c, "error")) for c in points]
    assert sums == sorted(sums, reverse=True) and len(set(sums)) == len(sums) > 3
    for size, error in sums:
        assert error == pytest.approx(enumerated(options, "error", {"size": size}))
        assert size == enumerated(options, "size", {"error": error * (1 + 1e-12)})
    assert sums[0][1] == 0 and sums[-1][0] == sum(layer[0]["size"] for layer in options)


@pytest.mark.parametrize("seed", range(6))
def test_a_ruinous_option_does_not_blur_the_rest(seed):
    options = drawn(seed, scale=1e-6)
    options[0][0]["error"], options[1][0]["error"] = 1e9, 1e12
    least = sum(min(o["size"] for o in layer) for layer in options)
    for factor in (1.0, 1.5, 3):
        chosen = allocate(options, "error", {"size": factor * least})
        best = enumerated(options, "error", {"size": factor * least})
        assert total(options, chosen, "error") == pytest.approx(best, rel=1e-9, abs=0)


def test_of_equal_options_the_smallest_is_taken():
    same = [{"error": 0.0, "size": 8.0, "bops": 1.0}, {"error": 0.0, "size": 4.0, "bops": 2.0}]
    other = [{"error": 1.0, "size": 2.0, "bops": 1.0}, {"error": 0.0, "size": 9.0, "bops": 1.0}]
    options = [same, other]
    assert allocate(options, "error", {"size": 1000.0}) == [1, 1]
    assert allocate(options, "error", {"bops": 1000.0}) == [0, 1]
    assert front(options, "size", "error", 3) == [[1, 1], [1, 0]]
    assert front(options, "bops", "error", 3) == [[0, 1]]
