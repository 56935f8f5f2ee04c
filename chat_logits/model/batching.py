"""Aligned conversations through the model: which share a forward pass and a prefix; smaller batches if need be."""

import itertools
import logging
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

import logit_codec
from chat_logits.data.reader import Aligned
from chat_logits.errors import ToolkitError
from chat_logits.model.out_of_memory import OUT_OF_MEMORY, is_out_of_memory
from chat_logits.model.selection import PendingDistributions, SelectionSettings
from chat_logits.model.teacher import Request, Teacher
from logit_codec import Distributions

logger = logging.getLogger(__name__)

# Of all tokens, beside an accelerator: its attention is slower behind a cache, 0.78 of the speed at a share of 0.21.
LEAST_PREFIX_SHARE = 0.5
SHORTEST_PREFIX = 8  # tokens; below, copying the cache costs more than it saves
TOGETHER = 256  # positions that are looked at together, while the conversations agree
PIECES = 16  # times fewer logit rows, from one attempt with a single conversation to the next
NO_PREFIX = np.zeros(0, np.int64)
BATCH_COST = 1 / 16  # of the budget's tokens: what a batch more costs beside its tokens
CACHED_A_TOKEN = 4  # tokens of a batch's cache for each token of the budget, which bounds it under a long prefix


@dataclass(frozen=True)
class Budget:
    """What one forward pass may hold: padded ``tokens`` in the decoder, and ``logit_rows`` times the vocabulary."""

    tokens: int
    logit_rows: int

    def halved(self) -> "Budget":
        return Budget(max(1, self.tokens // 2), max(1, self.logit_rows // 2))


@dataclass(frozen=True)
class Sharing:
    """What a model's conversations may share so that each has the logits that it has alone.

    ``batch`` says what a batch may hold: "padded", any of them; "equal", those of one length, read to their ends; or
    one "alone". ``prefix`` is whether a prefix's cache may be shared. Conversations of more than ``up_to`` tokens
    (None: there are none) share nothing. ``limit``, in nats, is what rows of logits may differ by, root mean square.
    """

    batch: str = "padded"
    prefix: bool = True
    up_to: int | None = None
    limit: float = 0.0

    def less(self, other: "Sharing") -> "Sharing":
        """What both allow."""
        batch = max(self.batch, other.batch, key=("padded", "equal", "alone").index)
        limits = [limit for limit in (self.up_to, other.up_to) if limit is not None]
        return Sharing(batch, self.prefix and other.prefix, min(limits, default=None), max(self.limit, other.limit))

    def restrictions(self, prefix_cache: bool) -> list[str]:
        """What conversations may not share, in lines; ``prefix_cache`` is whether it is wanted."""
        lines = []
        if self.batch != "padded":
            together = "only those of one length in a batch" if self.batch == "equal" else "one in a batch"
            lines.append(f"Conversations are read to their ends, {together}: later tokens change this model's logits")
        if prefix_cache and not self.prefix:
            lines.append("Shared prefixes are not cached: this model's cache does not give the plain logits")
        if self.up_to is not None:
            lines.append(
                f"Conversations of more than {self.up_to} tokens, a window of the model, are computed each alone"
            )
        return lines


def plan_batches(lengths: list[int], rows: list[int], budget: Budget) -> list[list[int]]:
    """Indices of conversations of like length, longest first, each batch within both budgets.

    Of all ways to cut the conversations in their order, the one with the fewest padded tokens, each batch counted as
    ``BATCH_COST`` of the budget more. ``rows`` are the logit rows of each conversation. One that alone exceeds a budget
    is a batch of its own.

    >>> plan_batches([3, 9, 4, 10], [1, 1, 1, 1], Budget(tokens=20, logit_rows=8))
    [[3, 1], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cuts = _cheapest_cuts(np.array([lengths[i] for i in order]), np.array([rows[i] for i in order]), budget)
    return [order[begin:end] for begin, end in itertools.pairwise(cuts)]


def _cheapest_cuts(lengths: np.ndarray, rows: np.ndarray, budget: Budget) -> list[int]:
    """Where batches begin and end, [0, …, n], for the lengths and rows (n,) of conversations, longest first."""
    until, first = np.cumsum([0, *rows]), 0
    least, begins = np.zeros(len(lengths) + 1), [0]  # of the first conversations: cost, and their last batch's begin
    for end in range(1, len(lengths) + 1):
        while first < end - 1 and (
            lengths[first] * (end - first) > budget.tokens or until[end] - until[first] > budget.logit_rows
        ):
            first += 1
        begin = np.arange(first, end)
        costs = least[first:end] + lengths[first:end] * (end - begin) + budget.tokens * BATCH_COST
        least[end] = costs.min()
        begins.append(first + int(costs.argmin()))
    cuts = [len(lengths)]
    while cuts[-1]:
        cuts.append(begins[cuts[-1]])
    return cuts[::-1]


def shared_prefix(sequences: list[np.ndarray], limits: list[int]) -> np.ndarray:
    """The prefix that is most worth computing once, int64; empty where none is.

    Of those on the way along each position's most common token, the one that saves the most tokens.

    ``limits`` says how many of a sequence's first tokens may be taken: not the one that predicts its first row.

    >>> shared_prefix([np.arange(20), np.arange(30), np.ones(9, int)], [19, 29, 8]).size
    19
    """
    most, alive, position = np.array(limits, np.int64), np.arange(len(sequences)), 0
    best, saved, leader = 0, 0, 0
    while len(alive := alive[most[alive] > position]) > 1:
        end = min(position + TOGETHER, int(most[alive].min()))
        tokens = np.stack([sequences[i][position:end] for i in alive])
        agrees = (tokens == tokens[0]).all(axis=0)
        if agrees[0]:
            position += len(agrees) if agrees.all() else int(agrees.argmin())
        else:
            alive = alive[tokens[:, 0] == Counter(tokens[:, 0].tolist()).most_common(1)[0][0]]
            position += 1
        if (len(alive) - 1) * position > saved:
            saved, best, leader = (len(alive) - 1) * position, position, int(alive[0])
    return sequences[leader][:best] if best >= SHORTEST_PREFIX else NO_PREFIX


class Batches:
    """Computes shards of conversations as a run's ``settings`` say; ``input_tokens`` have been read so far.

    ``settings`` has the attributes ``top_k``, ``top_p``, ``num_sampled``, ``seed``, ``batch_tokens``,
    ``batch_logit_rows`` and ``prefix_cache``; ``sharing`` is what the probe found. The first batch whose
    conversations share anything is held against two of them alone; ToolkitError is raised where they differ.
    """

    def __init__(self, model, settings, sharing: Sharing):
        self.budget = Budget(settings.batch_tokens, settings.batch_logit_rows)
        self.settings = SelectionSettings(settings.top_k, settings.top_p, settings.num_sampled)
        self.seed, self.prefix_cache = settings.seed, settings.prefix_cache
        self.teacher = Teacher(model, self.budget.logit_rows)
        self.sharing = sharing.less(Sharing(up_to=self.teacher.length_switch))
        self.input_tokens = 0
        self._is_checked = False

    def compute(self, ready: list[Aligned]) -> Iterator[tuple[list[Aligned], PendingDistributions | None]]:
        """Batches of the conversations with their results, in no particular order.

        None in the place of results is of a conversation for which memory is too small, though it is alone.
        """
        most = math.inf if self.sharing.up_to is None else self.sharing.up_to
        self.teacher.reads_whole = self._reads_whole
        for prefix, group in self._by_prefix([aligned for aligned in ready if len(aligned.input_ids) <= most]):
            held = self._hold(prefix)
            yield from self._compute_group(self._plan(group, held), held)
        self._hold(NO_PREFIX)
        self.teacher.reads_whole = True
        yield from self._compute_group([[aligned] for aligned in ready if len(aligned.input_ids) > most], 0)

    @property
    def _reads_whole(self) -> bool:
        return self.sharing.batch != "padded" or self.teacher.length_switch is not None

    def _hold(self, prefix: np.ndarray) -> int:
        """Have the teacher hold a prefix, or none where there is no room for it; gives its length."""
        try:
            self.teacher.hold_prefix(prefix)
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            self.teacher.hold_prefix(NO_PREFIX)
            return 0
        return len(prefix)

    def _by_prefix(self, ready: list[Aligned]) -> list[tuple[np.ndarray, list[Aligned]]]:
        """The conversations that have the prefix most worth sharing, and the others."""
        if not (self.prefix_cache and self.sharing.prefix):
            return [(NO_PREFIX, ready)]
        limits = [int(aligned.positions[0]) - 1 for aligned in ready]
        prefix = shared_prefix([aligned.input_ids for aligned in ready], limits)
        groups: dict[bool, list[Aligned]] = {True: [], False: []}
        for aligned, limit in zip(ready, limits, strict=True):
            shares = limit >= len(prefix) and np.array_equal(aligned.input_ids[: len(prefix)], prefix)
            groups[shares].append(aligned)
        saved, all_tokens = len(prefix) * len(groups[True]), sum(len(aligned.input_ids) for aligned in ready)
        if self.teacher.device.type != "cpu" and saved < LEAST_PREFIX_SHARE * all_tokens:
            return [(NO_PREFIX, ready)]
        return [(chosen, group) for chosen, group in ((prefix, groups[True]), (NO_PREFIX, groups[False])) if group]

    def _compute_group(
        self, waiting: list[list[Aligned]], shared: int
    ) -> Iterator[tuple[list[Aligned], PendingDistributions | None]]:
        while waiting:
            members = waiting.pop(0)
            pending = self._attempt(members)
            if pending is None and len(members) == 1:
                pending = self._attempt_in_pieces(members)
                if pending is None:
                    yield members, None
                    continue
            if pending is None:
                self._shrink()
                waiting = [batch for some in (members, *waiting) for batch in self._plan(some, shared)]
                continue
            self._check_first(members, pending, shared)
            self.input_tokens += sum(len(aligned.input_ids) for aligned in members)
            yield members, pending

    def _check_first(self, members: list[Aligned], pending: PendingDistributions, shared: int) -> None:
        """Hold the first batch that shares anything against its longest and its most padded conversation alone."""
        if self._is_checked or (len(members) == 1 and not shared):
            return
        self._is_checked = True
        ends = np.cumsum([len(aligned.positions) for aligned in members])
        for place in sorted({0, len(members) - 1}):
            aligned = members[place]
            if (alone := self._alone(aligned)) is None:
                logger.warning("The first batch was not checked: out of memory with a conversation of it alone")
                return
            found, rows = pending.wait(), slice(ends[place] - len(aligned.positions), ends[place])
            if not (np.isfinite(alone.logsumexp).all() or np.isfinite(found.logsumexp[rows]).all()):
                continue  # a bad row, whichever way it is computed
            difference = _difference(found, rows, alone)
            if not difference <= self.sharing.limit:
                raise ToolkitError(
                    f"first batch: log-probabilities of source row {aligned.source_index} differ from those of the "
                    f"conversation alone by {difference:.3g} nats (root mean square), expected at most "
                    f"{self.sharing.limit:.3g}. Try `attn_implementation` eager, `dtype` float32 or `batch_tokens` 1."
                )

    def _alone(self, aligned: Aligned) -> Distributions | None:
        """A conversation that shares nothing, or None where memory was too small."""
        teacher = Teacher(self.teacher.model, self.budget.logit_rows)
        teacher.reads_whole = True
        try:
            return teacher.distributions([self._request(aligned)], self.settings).wait()
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _attempt(self, members: list[Aligned]) -> PendingDistributions | None:
        """The batch's results, or None where memory was too small, with nothing left that holds what there was."""
        try:
            return self.teacher.distributions([self._request(aligned) for aligned in members], self.settings)
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _attempt_in_pieces(self, members: list[Aligned]) -> PendingDistributions | None:
        """The same with fewer and fewer logit rows at once. The budget stays: one conversation is no measure of it."""
        try:
            while self.teacher.logit_rows > 1:
                self.teacher.logit_rows = max(1, self.teacher.logit_rows // PIECES)
                _empty_cache()
                if (pending := self._attempt(members)) is not None:
                    return pending
            return None
        finally:
            self.teacher.logit_rows = self.budget.logit_rows
            _empty_cache()

    def _plan(self, group: list[Aligned], shared: int) -> list[list[Aligned]]:
        """Batches, the longest first: it fails first if one must. The others are mixed, so that their pace is even."""
        batches = [batch for some in self._alike(group) for batch in self._plan_alike(some, shared)]
        rest = batches[1:]
        random.Random(0).shuffle(rest)
        return batches[:1] + rest

    def _alike(self, group: list[Aligned]) -> list[list[Aligned]]:
        """Those that may share a batch; the longest first, where there are several kinds."""
        if self.sharing.batch == "padded":
            return [group]
        by_length: dict[int, list[Aligned]] = {}
        for aligned in sorted(group, key=lambda aligned: -len(aligned.input_ids)):
            by_length.setdefault(len(aligned.input_ids), []).append(aligned)
        if self.sharing.batch == "equal":
            return list(by_length.values())
        return [[aligned] for some in by_length.values() for aligned in some]

    def _plan_alike(self, group: list[Aligned], shared: int) -> list[list[Aligned]]:
        full = [len(aligned.input_ids) if self.teacher.reads_whole else int(aligned.positions[-1]) for aligned in group]
        lengths = [max(length - shared, -(-length // CACHED_A_TOKEN) if shared else 0) for length in full]
        rows = [len(aligned.positions) for aligned in group]
        return [[group[i] for i in batch] for batch in plan_batches(lengths, rows, self.budget)]

    def _request(self, aligned: Aligned) -> Request:
        uniforms = logit_codec.draw_uniforms(self.seed, aligned.source_index, len(aligned.positions))
        return Request(aligned.input_ids, aligned.positions, uniforms)

    def _shrink(self) -> None:
        self.budget = self.budget.halved()
        self.teacher.logit_rows = self.budget.logit_rows
        _empty_cache()
        now = f"{self.budget.tokens} tokens and {self.budget.logit_rows} logit rows"
        logger.warning("Out of memory: going on with batches of %s", now)


def _empty_cache() -> None:
    """Give back what a failed attempt has left reserved."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _difference(found: Distributions, rows: slice, alone: Distributions) -> float:
    """Root mean square difference of the target log-probabilities, or of the logsumexps if that is more, in nats."""
    with np.errstate(invalid="ignore"):  # both may be -inf
        errors = [
            np.where(there == here, 0, there - here)
            for there, here in (
                (found.token_log_probs[rows], alone.token_log_probs),
                (found.logsumexp[rows], alone.logsumexp),
            )
        ]
    return float(max(np.sqrt(np.square(error).mean()) for error in errors))
