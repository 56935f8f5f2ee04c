"""The scale that shades a page's tokens, against counting."""

import itertools
import math
import re

import numpy as np
import pytest

from chat_logits.display.measures import LEVELS, Measure, adaptive_floor, is_skewed, short_number

GENERATOR = np.random.default_rng(0)
# Surprisals in nats: of a model that knows the text, of an ordinary one, and of a random one with 49,152 tokens.
ROWS = {
    "strong": GENERATOR.exponential(0.2, 400).tolist(),
    "ordinary": GENERATOR.gamma(0.7, 4, 400).tolist(),
    "weak": (8 + GENERATOR.gamma(9, 0.35, 400)).tolist(),
}


def measure(numbers, floor=0.1, is_logarithmic=False) -> Measure:
    return Measure("surprisal", "Surprisal", "nats", numbers, floor, is_logarithmic)


@pytest.mark.parametrize("row", ROWS)
def test_shades_begin_at_the_rows_own_quantiles(row):
    numbers = ROWS[row]
    shades = [measure(numbers).shade(number) for number in numbers]
    shaded = [number for number in numbers if number >= 0.1]
    assert [shade == 0 for shade in shades] == [number < 0.1 for number in numbers]
    for shade, level in enumerate(LEVELS, start=1):
        below = sum(0 < found < shade for found in shades)
        assert below / len(shaded) == pytest.approx(level, abs=0.03)  # bounds have three digits
    assert set(shades) >= set(range(1, 8))
    ordered = sorted(range(len(numbers)), key=numbers.__getitem__)
    assert all(shades[a] <= shades[b] for a, b in itertools.pairwise(ordered))


def test_the_legend_says_where_each_shade_begins():
    found = measure(ROWS["weak"])
    labels = [float(label) for label, _ in found.legend[1:]]
    for number in ROWS["weak"]:
        told = [shade for (_, shade), label in zip(found.legend[1:], labels, strict=True) if label <= number]
        assert found.shade(number) == max(told, default=0)


def test_numbers_that_are_all_the_same_have_one_shade():
    found = measure([3.0] * 20)
    assert {found.shade(number) for number in found.values} == {7}
    assert [label for label, _ in found.legend] == ["", "0.1", "3"]
    assert measure([0.0] * 20).legend == [("", 0), ("0.1", 7)] and measure([]).legend == [("", 0), ("0.1", 7)]


def bars(found: Measure) -> list[float]:
    """Each bar's height in hundredths, in order, from the strip's paths."""
    paths = "".join(path for _, path in found.strip["paths"])
    return [97 - float(y) for _, y in sorted((int(x), y) for x, y in re.findall(r"M(\d+) 100V([\d.]+)", paths))]


def test_bars_are_as_high_as_the_numbers():
    numbers = [0.0, 2.0, 4.0, 8.0]
    assert bars(measure(numbers)) == pytest.approx([0, 24.25, 48.5, 97], abs=0.06)
    tiny = [0.0, 1e-5, 1e-4, 1e-3]
    assert bars(measure(tiny, 1e-5, True)) == pytest.approx([0, 0, 48.5, 97], abs=0.06)
    assert measure(tiny, 1e-5, True).strip["top"] == "0.001 nats, logarithmic"


def test_many_tokens_share_a_bar_as_high_as_the_largest():
    numbers = ROWS["ordinary"] * 5  # 2,000 tokens in 800 bars at most: three a bar
    found = measure(numbers)
    groups = [max(numbers[i : i + 3]) for i in range(0, len(numbers), 3)]
    assert bars(found) == pytest.approx([97 * min(1, value / found.top) for value in groups], abs=0.06)


def test_one_number_beyond_all_others_leaves_the_strip_readable():
    numbers = [*ROWS["ordinary"], 3.4e38, math.inf]
    found = measure(numbers)
    assert found.top <= 3 * max(ROWS["ordinary"]) and found.strip["top"].endswith("+ nats")
    assert all(math.isfinite(value) for value in found.values) and found.shade(found.values[-1]) == 7


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("is_logarithmic", [False, True])
def test_the_threshold_can_stand_from_nothing_to_the_largest(row, is_logarithmic):
    found = measure(ROWS[row], is_logarithmic=is_logarithmic)
    assert found.stops[0] == 0 and found.stops == sorted(set(found.stops)) and 10 <= len(found.stops) <= 130
    counts = [sum(number >= stop for number in ROWS[row]) for stop in found.stops]
    assert counts[0] == len(ROWS[row]) and 0 < counts[-1] < 0.3 * len(ROWS[row])
    assert 0.2 < counts[found.start] / sum(number >= 0.1 for number in ROWS[row]) < 0.6


def test_floors_and_skew_follow_the_numbers():
    assert adaptive_floor([0, 0.0002, 0.0003, 0.0009, 0.5], 1e-6, 1e-2) == 1e-4
    assert adaptive_floor([1e-9, 2e-9], 1e-6, 1e-2) == 1e-6
    assert adaptive_floor([5, 6], 1e-6, 1e-2) == adaptive_floor([0, 0], 1e-6, 1e-2) == 1e-2
    assert is_skewed([0, 0.001, 0.001, 3]) and not is_skewed([1, 2, 3]) and not is_skewed([0.0])


def test_short_numbers():
    numbers = (0, 0.25, 12.34, 1e-6, 1234.5, 1234567)
    assert [short_number(number) for number in numbers] == ["0", "0.25", "12.3", "1e-6", "1,234", "1.23e6"]
