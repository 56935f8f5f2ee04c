"""Pack conversations of any length into batches of about the same number of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

OPEN = 16  # packs that are filled at the same time
SORTED = 1024  # conversations among which those of like length are padded together


@dataclass
class _Pack:
    numbers: list[int]
    tokens: int
    longest: int

    def size_with(self, length: int, is_padded: bool) -> int:
        """Its tokens, with padding or without, if a conversation of this length were in it."""
        return (len(self.numbers) + 1) * max(self.longest, length) if is_padded else self.tokens + length

    def add(self, number: int, length: int) -> None:
        self.numbers.append(number)
        self.tokens, self.longest = self.tokens + length, max(self.longest, length)


def plan_packs(lengths: Sequence[int], most: int, seed: int, is_padded: bool = False) -> list[list[int]]:
    """Each conversation's number once, in packs of at most ``most`` tokens; a longer one is a pack of its own.

    In random order, each goes into the first of the last ``OPEN`` packs that has room for it. With ``is_padded``, each
    counts as many tokens as the longest in its pack, and of each ``SORTED`` conversations the shorter ones come first.
    """
    sizes, order = np.array(lengths, np.int64), np.random.default_rng(seed).permutation(len(lengths))
    if is_padded:
        parts = [order[start : start + SORTED] for start in range(0, len(order), SORTED)]
        order = np.concatenate([order[:0], *(part[np.argsort(sizes[part])] for part in parts)])
    packs: list[_Pack] = []
    done: list[list[int]] = []
    for number in order.tolist():
        length = lengths[number]
        pack = next((pack for pack in packs if pack.size_with(length, is_padded) <= most), None)
        if pack:
            pack.add(number, length)
        else:
            packs.append(_Pack([number], length, length))
        if len(packs) > OPEN:
            done.append(packs.pop(0).numbers)
    return done + [pack.numbers for pack in packs]


class Packs:
    """The packs of a ``training_dataset``, each a list of examples, for a DataLoader with one pack a batch."""

    def __init__(self, examples: Any, packs: list[list[int]]):
        self._examples, self._packs = examples, packs

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, number: int) -> list[dict]:
        columns = self._examples[self._packs[number]]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class OfOnePack:
    """Gives a collator the one pack that a DataLoader gives."""

    def __init__(self, collator: Any):
        self._collator = collator

    def __call__(self, packs: list[list[dict]]) -> dict:
        (examples,) = packs
        return self._collator(examples)
