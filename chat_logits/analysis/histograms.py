"""Values counted in fixed bins."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Histogram:
    """How many values are in each bin, those from ``edges[i]`` up to, and without, ``edges[i + 1]``.

    One that ``is_open_ended`` has no edge behind its last bin.
    """

    edges: list[float]
    counts: list[int]
    is_open_ended: bool

    @property
    def bins(self) -> list[tuple[float, float | None, int]]:
        """Each bin's lower edge, upper edge (None where it is open) and count."""
        highs = [*self.edges[1:], None] if self.is_open_ended else self.edges[1:]
        return list(zip(self.edges[: len(self.counts)], highs, self.counts, strict=True))


def count_in_bins(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Counts by open-ended bins, int64 like ``edges``, whose last is their lower end; what is below is in the first."""
    return np.bincount(np.maximum(np.searchsorted(edges, values, side="right") - 1, 0), minlength=len(edges))
