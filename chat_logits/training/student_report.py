"""Where a student is far from its teacher: forward KL over stored rows, by kinds of position. Only numbers;
``student_pass`` runs the student.

Groups of positions must not depend on the draws, as this would bias their means: if the entropy were estimated from the
draws, for example, positions with unlucky draws would gather in one group.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from chat_logits.analysis.token_classes import TOKEN_CLASSES, TokenClasses
from chat_logits.data.alignment import PROMPT, Alignment
from chat_logits.data.stored_messages import question_of
from chat_logits.training.distance import Distance, DistanceSums
from chat_logits.words import count_text
from logit_codec import CODE_LOG_PROBS, CODE_PROBS, row_entries

WORST = 10  # conversations that are listed
ENTROPIES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # nats, lower ends of bins; the last bin is open


@dataclass(frozen=True)
class StudentGroup(Distance):
    """A group of positions; ``share`` is its part of all positions' total KL."""

    name: str
    share: float


@dataclass(frozen=True)
class StudentConversation:
    """A conversation, its row and its source row; numbers are as in ``StudentGroup``; ``question`` is the beginning of
    its first user message, "" without one."""

    sample_index: int
    source_index: int
    positions: int
    kl: float
    kl_tail: float
    agreement: float
    question: str


@dataclass(frozen=True, repr=False)
class StudentReport:
    """A student over the stored rows of a dataset of ``num_rows`` conversations.

    ``whole`` is over all positions. ``by_class`` groups them by the target token's ``token_class``; ``by_turn`` by the
    assistant's turns, the stretches of its tokens between prompts; ``by_position`` by the place among the extracted
    tokens of a turn, from 1; ``by_entropy`` by the teacher's entropy, nats, with its tail as one entry, so that it does
    not depend on the draws. The ``worst`` conversations have the largest mean KL. ``ends_left_out`` counts ends of
    turns that were not extracted: no distribution is stored for them.
    """

    dataset_id: str
    teacher_id: str
    student_id: str
    dtype: str
    device: str
    num_rows: int
    ends_left_out: int
    whole: StudentGroup
    by_class: list[StudentGroup]
    by_turn: list[StudentGroup]
    by_position: list[StudentGroup]
    by_entropy: list[StudentGroup]
    worst: list[StudentConversation]

    def as_dict(self) -> dict:
        """All of it as plain values."""
        content = asdict(self)
        return {"logit_dataset_id": content.pop("dataset_id"), **content}

    def __repr__(self) -> str:
        counts = (
            f"{count_text(self.whole.conversations, 'conversation')}, {count_text(self.whole.positions, 'position')}"
        )
        return f"<StudentReport of {self.student_id} on {self.dataset_id}: {counts}, KL {self.whole.kl:.4f} nats>"


class StudentTally:
    """Sums of the conversations added so far."""

    def __init__(self, tokenizer):
        self._classes = TokenClasses(tokenizer)
        self._whole = DistanceSums()
        self._groups: dict[str, dict] = {
            kind: defaultdict(DistanceSums) for kind in ("class", "turn", "position", "entropy")
        }
        self._worst: list[tuple[float, int, StudentConversation]] = []
        self._ends_left_out = 0

    def add(self, sample_index: int, row: dict, alignment: Alignment, values: np.ndarray) -> None:
        """Add a row, with ``values`` (n, 4) float64 of its extracted positions: 1, forward KL and the tail's part of
        it, nats, and whether the most probable tokens agree."""
        turns, places = turns_and_places(alignment)
        keys = {
            "class": np.array(self._classes.of(alignment.input_ids, alignment.positions)),
            "turn": _doubling(turns),
            "position": _doubling(places),
            "entropy": np.searchsorted(ENTROPIES, stored_entropies(row), side="right") - 1,
        }
        for kind, of_each in keys.items():
            found, numbers = np.unique(of_each, return_inverse=True)
            sums = np.zeros((len(found), 4))
            np.add.at(sums, numbers, values)
            for key, of_key in zip(found.tolist(), sums, strict=True):
                self._groups[kind][key].add(of_key)
        self._whole.add(values.sum(axis=0))
        self._ends_left_out += sum(alignment.reasons[end] is not None for end in alignment.turn_ends)
        self._keep(sample_index, row, values)

    def _keep(self, sample_index: int, row: dict, values: np.ndarray) -> None:
        _, kl, kl_tail, agreement = values.mean(axis=0).tolist()
        place = (sample_index, row["source_index"], len(values))
        one = StudentConversation(*place, kl, kl_tail, agreement, question_of(row["messages"]))
        self._worst = heapq.nlargest(WORST, [*self._worst, (one.kl, -sample_index, one)], key=lambda each: each[:2])

    def groups(self) -> dict:
        """The fields of a ``StudentReport`` that are sums over the conversations, of which there must be at least
        one."""
        whole = float(self._whole.totals[1])
        return {
            "whole": _group("all", self._whole, whole),
            "by_class": self._named("class", lambda name: name, TOKEN_CLASSES.index),
            "by_turn": self._named("turn", _doubling_name),
            "by_position": self._named("position", _doubling_name),
            "by_entropy": self._named("entropy", _entropy_name),
            "worst": [one for *_, one in self._worst],
            "ends_left_out": self._ends_left_out,
        }

    def _named(self, kind: str, name: Callable, order: Callable | None = None) -> list[StudentGroup]:
        groups, whole = self._groups[kind], float(self._whole.totals[1])
        return [_group(name(key), groups[key], whole) for key in sorted(groups, key=order)]


def _group(name: str, sums: DistanceSums, whole: float) -> StudentGroup:
    share = float(sums.totals[1]) / whole if whole else 0.0
    return StudentGroup(**vars(sums.distance()), name=name, share=share)


def turns_and_places(alignment: Alignment) -> tuple[np.ndarray, np.ndarray]:
    """For each extracted position, int64 (n,): the number of its turn among all the assistant's turns, including those
    that are left out, and its number among the extracted positions of that turn; both from 1."""
    is_answer = np.array([reason != PROMPT for reason in alignment.reasons])
    begins = is_answer & ~np.concatenate([[False], is_answer[:-1]])
    turns = np.cumsum(begins)[alignment.positions]
    firsts = np.searchsorted(turns, turns, side="left")
    return turns, np.arange(len(turns)) - firsts + 1


def stored_entropies(row: dict) -> np.ndarray:
    """The teacher's entropy at a row's positions with everything outside the nucleus as one entry, nats, float64 (n,):
    a lower bound of the entropy that does not depend on the draws."""
    _, codes = row_entries(row, "top")
    probabilities = CODE_PROBS[codes]
    tail = np.maximum(0.0, 1.0 - probabilities.sum(axis=1))
    of_tail = tail * np.log(np.where(tail > 0, tail, 1))
    return np.maximum(0.0, -(probabilities * np.where(probabilities > 0, CODE_LOG_PROBS[codes], 0)).sum(1) - of_tail)


def _doubling(numbers: np.ndarray) -> np.ndarray:
    """The bin of each number among 1, 2, 3 – 4, 5 – 8 …, int64 from 0: bin b ends at 2 to the power of b."""
    return np.ceil(np.log2(numbers)).astype(np.int64)


def _doubling_name(power: int) -> str:
    low, high = 2 ** (power - 1) + 1 if power else 1, 2**power
    return f"{low:,}" if low == high else f"{low:,} – {high:,}"


def _entropy_name(number: int) -> str:
    low = ENTROPIES[number]
    return f"{low:g} and more" if number + 1 == len(ENTROPIES) else f"{low:g} – {ENTROPIES[number + 1]:g}"
