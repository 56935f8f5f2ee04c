"""Measures that shade a page's tokens: a number for each token, a scale of seven shades, and the strip over the answer.

Each row has its own scale: its shades begin at quantiles of the row's numbers, finer towards the largest, so that they
tell tokens apart whether or not the model knows the text.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

LEVELS = (0, 0.25, 0.45, 0.62, 0.76, 0.87, 0.95)  # shares of the shaded tokens below each of the shades
START = 2  # the shade of the threshold when a page opens
STRIP_BARS, STOPS = 800, 60
MANTISSAS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)  # of a logarithmic scale's stops
LARGEST = 1e300  # instead of infinite numbers, which JSON does not have


def short_number(number: float) -> str:
    """At most three digits.

    >>> short_number(0.25), short_number(12.34), short_number(1e-6), short_number(1234567.0)
    ('0.25', '12.3', '1e-6', '1.23e6')
    """
    if 0 < abs(number) < 1e-4 or abs(number) >= 1e5:
        mantissa, _, power = f"{number:.3g}".partition("e")
        return f"{mantissa}e{int(power)}" if power else mantissa
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


@dataclass(frozen=True)
class Measure:
    """A number for each extracted token, by which pages shade it.

    ``numbers`` are the tokens', in order, at least 0; those below ``floor`` have no shade. With ``is_logarithmic`` the
    heights of bars and the stops are logarithmic. ``unit`` is "" or for example "nats", ``note`` "" or for example
    "at least"; ``label`` formats a number for the legend.
    """

    key: str
    name: str
    unit: str
    numbers: Sequence[float]
    floor: float
    is_logarithmic: bool = False
    label: Callable[[float], str] = short_number
    note: str = ""

    @property
    def title(self) -> str:
        """The text before the legend."""
        return ", ".join(filter(None, (self.name, self.note, self.unit)))

    @cached_property
    def values(self) -> list[float]:
        """The numbers as pages compare them: with six digits, and finite."""
        return [float(f"{min(number, LARGEST):.6g}") for number in self.numbers]

    @cached_property
    def bounds(self) -> list[float]:
        """Where each of the seven shades begins: the floor, and quantiles of the numbers above it."""
        shaded = sorted(value for value in self.values if value >= self.floor)
        if not shaded:
            return [self.floor] * len(LEVELS)
        quantiles = (three_digits(shaded[int(level * len(shaded))]) for level in LEVELS[1:])
        return [self.floor, *(max(self.floor, quantile) for quantile in quantiles)]

    def shade(self, value: float) -> int:
        """The shade of a number, 0 to 7."""
        return bisect.bisect_right(self.bounds, value)

    @cached_property
    def legend(self) -> list[tuple[str, int]]:
        """The lower bound of each shade that a number can have, and that shade."""
        lowest = {bound: shade for shade, bound in enumerate(self.bounds, start=1)}
        return [("", 0), *((self.label(bound), shade) for bound, shade in lowest.items())]

    @cached_property
    def top(self) -> float:
        """The number at a full bar: the largest, unless a few are far above all others."""
        largest = max(self.values, default=0)
        return max(10 * self.floor, largest if self.is_logarithmic else min(largest, 3 * self.bounds[-1]))

    def height(self, value: float) -> float:
        """A bar's height, 0 to 1."""
        if not self.is_logarithmic:
            return min(1.0, value / self.top)
        return min(1.0, max(0.0, math.log(max(value, self.floor) / self.floor) / math.log(self.top / self.floor)))

    @cached_property
    def stops(self) -> list[float]:
        """Where the threshold can stand, ascending from 0."""
        most = min(self.top, max(self.values, default=0))
        if self.is_logarithmic:
            return [0, *(stop for stop in _logarithmic(self.floor, most))]
        step = _nice(most / STOPS) if most > 0 else 1
        return [float(f"{i * step:.6g}") for i in range(int(most / step + 1e-9) + 1)]

    @cached_property
    def start(self) -> int:
        """The index of the stop where the threshold is at first."""
        return max(0, min(bisect.bisect_left(self.stops, self.bounds[START]), len(self.stops) - 1))

    def shade_above(self, value: float) -> int:
        """The shade of a number with the threshold at its first stop; 0 below it."""
        return self.shade(value) if value >= self.stops[self.start] else 0

    def as_data(self) -> dict:
        """The data for the page's script: for each token its value and a digit of ``shades``, and the scale."""
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "values": self.values,
            "shades": "".join(str(self.shade(value)) for value in self.values),
            "legend": self.legend,
            "stops": [(stop, self.label(stop), round(100 * self.height(stop), 1)) for stop in self.stops],
            "start": self.start,
            "strip": self.strip,
        }

    @cached_property
    def strip(self) -> dict:
        """Bars over the answer by shade; with many tokens, each bar is the largest of neighbouring tokens."""
        group = max(1, -(-len(self.values) // STRIP_BARS))
        paths: dict[int, str] = {}
        for start in range(0, len(self.values), group):
            value = max(self.values[start : start + group])
            width = min(group, len(self.values) - start)
            path = f"M{start} 100V{97 - 97 * self.height(value):.1f}h{width}V100z"
            shade = self.shade(value)
            paths[shade] = paths.get(shade, "") + path
        above = "+" if max(self.values, default=0) > self.top else ""
        scale = f"{self.label(self.top)}{above}{f' {self.unit}' if self.unit else ''}"
        return {
            "width": max(1, len(self.values)),
            "paths": sorted(paths.items()),
            "top": f"{scale}, logarithmic" if self.is_logarithmic else scale,
        }


def adaptive_floor(numbers: Iterable[float], least: float, most: float) -> float:
    """A power of ten, from ``least`` to ``most``, that at most a quarter of the positive numbers are below."""
    positive = sorted(number for number in numbers if number > 0)
    if not positive:
        return most
    power = 10.0 ** math.floor(math.log10(positive[len(positive) // 4]))
    return float(f"{min(most, max(least, power)):.0e}")


def is_skewed(numbers: Iterable[float]) -> bool:
    """Whether most of the positive numbers are less than a tenth of the largest."""
    positive = sorted(number for number in numbers if number > 0)
    return bool(positive) and positive[len(positive) // 2] < positive[-1] / 10


def three_digits(number: float) -> float:
    return float(f"{number:.3g}")


def _logarithmic(floor: float, most: float) -> list[float]:
    powers = range(math.floor(math.log10(floor)), math.floor(math.log10(max(most, floor))) + 1)
    stops = (float(f"{mantissa * 10.0**power:.3g}") for power in powers for mantissa in MANTISSAS)
    return [stop for stop in stops if floor <= stop <= most]


def _nice(step: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(nice * power for nice in (1, 2, 5, 10) if nice * power >= step * (1 - 1e-9))
