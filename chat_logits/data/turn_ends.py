"""Which token ends a turn of the assistant: the one that a model has to generate to stop. FORMAT.md, "From a row to its
tokens", has the rules.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TurnEnds:
    """Finds the tokens that end turns. ``ending_ids`` are the special tokens except think tags, ``eos_id`` is the
    tokenizer's end token, and ``earlier_end`` gives the token that ends an answer before the last one, None without."""

    ending_ids: Collection[int]
    eos_id: int | None
    earlier_end: Callable[[], int | None]

    def find(
        self,
        spans: Sequence[tuple[int, int]],
        left_out: Collection[int],
        input_ids: np.ndarray,
        extents: np.ndarray,
        text: str,
    ) -> tuple[int, ...]:
        """Positions, ascending, of the tokens that end the turns with these ``spans``, except those ``left_out``.

        ``input_ids`` is (T,), and ``extents`` (T, 2) has the characters that each token stands for. A turn that does
        not end with a special token has none; nor does one that would end with the first token, which nothing predicts.
        """
        is_ending = np.array([token in self.ending_ids for token in input_ids.tolist()], bool)
        following = [start for start, _ in spans[1:]] + [np.inf]
        found: list[int] = []
        for number, (start, end) in enumerate(spans):
            if number not in left_out:
                row = _row_inside(is_ending, extents, text, start, end)
                found += self._end_of(row, input_ids) or self._end_behind(
                    input_ids, is_ending, extents, end, following[number]
                )
        return tuple(position for position in found if position > 0)

    def _end_of(self, row: list[int], input_ids: np.ndarray) -> list[int]:
        """The end among consecutive special tokens: the one that also ends earlier answers, as the last may end the
        conversation; otherwise the last one, as the others may close a tool call or open an empty answer."""
        if len(row) < 2:
            return row
        earlier = self.earlier_end()
        return [i for i in row if input_ids[i] == earlier][-1:] or row[-1:]

    def _end_behind(self, input_ids, is_ending, extents, end: int, next_start: float) -> list[int]:
        """The special token, if any, right after a turn's span: a template may mark answers without their ends, and
        GLM's answers end where the next message's header begins.

        If it is the only one before the assistant's next turn, it is that turn's header, unless it is the tokenizer's
        end token.
        """
        is_between = (extents[:, 0] >= end) & (extents[:, 0] < next_start) & (extents[:, 1] > end)
        special = np.flatnonzero(is_between & is_ending).tolist()
        if not special or extents[special[0], 0] > end:
            return []
        is_header = next_start < np.inf and len(special) == 1
        return [] if is_header and input_ids[special[0]] != self.eos_id else special[:1]


def _row_inside(is_ending, extents, text: str, start: int, end: int) -> list[int]:
    """The consecutive special tokens, if any, that end a turn within its span, with only white space and further
    special tokens after them; those after white space end the conversation."""
    row: list[int] = []
    for i in np.flatnonzero((extents[:, 0] < end) & (extents[:, 1] > start))[::-1].tolist():
        if is_ending[i]:
            row = [i, *row] if row and row[0] == i + 1 else [i]
        elif text[max(start, extents[i, 0]) : extents[i, 1]].strip():
            break
    return row
