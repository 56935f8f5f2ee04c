"""Pack conversations of any length into batches of about the same number of tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def plan_packs(lengths: Sequence[int], most: int, seed: int, is_padded: bool = False) -> list[list[int]]:
    """Each conversation's number once, in packs of at most ``most`` tokens; a longer one is a pack of its own.

    With ``is_padded``, each conversation counts as many tokens as the longest in its pack. In random order, each goes
    into the first of the last ``OPEN`` packs that has room for it.
    """

    def size(count: int, used: int, longest: int) -> int:
        return count * longest if is_padded else used

    open_packs: list[tuple[list[int], int, int]] = []  # numbers, sum of the lengths, longest
    done: list[list[int]] = []
    for number in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        length = lengths[number]
        for i, (pack, used, longest) in enumerate(open_packs):
            grown = [*pack, number], used + length, max(longest, length)
            if size(len(grown[0]), *grown[1:]) <= most:
                open_packs[i] = grown
                break
        else:
            open_packs.append(([number], length, length))
        if len(open_packs) > OPEN:
            done.append(open_packs.pop(0)[0])
    return done + [pack for pack, *_ in open_packs]


OPEN = 16  # packs that are filled at the same time


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
