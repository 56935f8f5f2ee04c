"""Runs aligned conversations through the model: forms batches, shares prefixes, shrinks batches if memory is short."""

import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

import logit_codec
from chat_logits.data.reader import Aligned
from chat_logits.errors import ToolkitError
from chat_logits.model.batch_plan import NO_PREFIX, Budget, plan_batches, shared_prefix
from chat_logits.model.memory import is_taken_by_others
from chat_logits.model.out_of_memory import OUT_OF_MEMORY, is_out_of_memory
from chat_logits.model.selection import PendingDistributions, SelectionSettings
from chat_logits.model.teacher import Request, Teacher
from logit_codec import Distributions

logger = logging.getLogger(__name__)

# The share of all tokens that a shared prefix must cover on an accelerator, where attention with a cache is slower:
# 0.78 of the speed at a share of 0.21.
LEAST_PREFIX_SHARE = 0.5
PIECES = 16  # each new attempt with a single conversation computes this many times fewer logit rows at once
PAUSES = (1, 5, 30)  # seconds to wait for another process to free memory
GROW_AFTER = 64  # successful batches with halved budgets before the budgets are doubled again
CACHED_A_TOKEN = 4  # cached tokens allowed for each token of the budget: limits the cache when the prefix is long


@dataclass(frozen=True)
class Sharing:
    """What a model's conversations may share without a change of the logits that each has alone.

    ``batch`` says what a batch may hold: "padded", conversations of any lengths; "equal", those of one length, read to
    their ends; "alone", a single one. ``prefix`` says whether the cache of a prefix may be shared. Conversations of
    more than ``up_to`` tokens (None: no limit) share nothing. ``limit``, in nats, is the largest root mean square
    difference allowed for a row of logits.
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
        """What conversations may not share, as lines of text; ``prefix_cache`` says whether the option asks for it."""
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


class Batches:
    """Computes shards of conversations with a run's ``settings``; ``input_tokens`` counts the tokens read so far.

    ``settings`` has the attributes ``top_k``, ``top_p``, ``num_sampled``, ``seed``, ``batch_tokens``,
    ``batch_logit_rows`` and ``prefix_cache``; ``sharing`` is what the probe found. For the first batch whose
    conversations share anything, two of them are computed again alone; ToolkitError is raised if the results differ.
    """

    def __init__(self, model, settings, sharing: Sharing):
        self.budget = Budget(settings.batch_tokens, settings.batch_logit_rows)
        self.settings = SelectionSettings(settings.top_k, settings.top_p, settings.num_sampled)
        self.seed, self.prefix_cache = settings.seed, settings.prefix_cache
        self.teacher = Teacher(model, self.budget.logit_rows)
        self.sharing = sharing.less(Sharing(up_to=self.teacher.length_switch))
        self.input_tokens = 0
        self._is_checked = False
        self._whole, self._until_growth, self._patience = self.budget, 0, GROW_AFTER

    def compute(self, ready: list[Aligned]) -> Iterator[tuple[list[Aligned], PendingDistributions | None]]:
        """Batches of the conversations with their results, in no particular order.

        The result is None for a conversation that does not fit in memory even alone. Raises ToolkitError if the device
        is large enough, but another process uses its memory and does not free it.
        """
        self._grow()
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
        """Have the teacher cache a prefix, or none if memory is too small; returns the length of what is cached."""
        try:
            self.teacher.hold_prefix(prefix)
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            self.teacher.hold_prefix(NO_PREFIX)
            return 0
        return len(prefix)

    def _by_prefix(self, ready: list[Aligned]) -> list[tuple[np.ndarray, list[Aligned]]]:
        """The conversations that begin with the prefix most worth sharing, and the others."""
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
                pending = self._attempt_alone(members)
                if pending is None:
                    yield members, None
                    continue
            if pending is None:
                self._shrink()
                waiting = [batch for some in (members, *waiting) for batch in self._plan(some, shared)]
                continue
            self._check_first(members, pending, shared)
            self._until_growth -= 1
            self.input_tokens += sum(len(aligned.input_ids) for aligned in members)
            yield members, pending

    def _check_first(self, members: list[Aligned], pending: PendingDistributions, shared: int) -> None:
        """Compare the first batch that shares anything with its longest and its most padded conversation alone."""
        if self._is_checked or (len(members) == 1 and not shared):
            return
        self._is_checked = True
        ends = np.cumsum([len(aligned.positions) for aligned in members])
        for place in sorted({0, len(members) - 1}):
            aligned = members[place]
            if (alone := self._alone(aligned)) is None:
                logger.warning("The first batch was not checked: out of memory with one of its conversations alone")
                return
            found, rows = pending.wait(), slice(ends[place] - len(aligned.positions), ends[place])
            if not (np.isfinite(alone.logsumexp).all() or np.isfinite(found.logsumexp[rows]).all()):
                continue  # a bad row, however it is computed
            difference = _difference(found, rows, alone)
            if not difference <= self.sharing.limit:
                raise ToolkitError(
                    f"first batch: log-probabilities of source row {aligned.source_index} differ from those of the "
                    f"conversation alone by {difference:.3g} nats (root mean square), expected at most "
                    f"{self.sharing.limit:.3g}. Try `attn_implementation` eager, `dtype` float32 or `batch_tokens` 1."
                )

    def _alone(self, aligned: Aligned) -> Distributions | None:
        """The results of a conversation that shares nothing, or None if memory was too small."""
        teacher = Teacher(self.teacher.model, self.budget.logit_rows)
        teacher.reads_whole = True
        try:
            return teacher.distributions([self._request(aligned)], self.settings).wait()
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _attempt(self, members: list[Aligned]) -> PendingDistributions | None:
        """The batch's results, or None if memory was too small; then nothing keeps the attempt's tensors alive."""
        try:
            return self.teacher.distributions([self._request(aligned) for aligned in members], self.settings)
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _attempt_alone(self, members: list[Aligned]) -> PendingDistributions | None:
        """As ``_attempt``, for one conversation: in pieces, with retries while another process uses the memory."""
        size = len(members[0].input_ids), len(members[0].positions)
        for pause in (*PAUSES, None):
            if (pending := self._attempt_in_pieces(members)) is not None:
                return pending
            if not is_taken_by_others(self.teacher.model, *size):
                return None
            if pause is not None:
                logger.warning("Out of memory because another process uses it: trying again in %d s", pause)
                time.sleep(pause)
        raise ToolkitError(
            f"out of memory for a conversation of {size[0]} tokens, which would fit on {self.teacher.device}: another "
            "process uses its memory. End that process; the same command resumes."
        )

    def _attempt_in_pieces(self, members: list[Aligned]) -> PendingDistributions | None:
        """As ``_attempt``, with fewer and fewer logit rows at once. The budget is kept: one conversation does not show
        that it is too large."""
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
        """Batches, the longest first, since it is the most likely to fail. The others are shuffled for an even pace."""
        batches = [batch for some in self._alike(group) for batch in self._plan_alike(some, shared)]
        rest = batches[1:]
        random.Random(0).shuffle(rest)
        return batches[:1] + rest

    def _alike(self, group: list[Aligned]) -> list[list[Aligned]]:
        """Groups of conversations that may share a batch; the longest first if there are several groups."""
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

    def _grow(self) -> None:
        """Double halved budgets again, as other processes may have freed memory. Less often each time."""
        if self.budget != self._whole and self._until_growth <= 0:
            self.budget, self._until_growth = self.budget.doubled(self._whole), self._patience
            self.teacher.logit_rows = self.budget.logit_rows

    def _shrink(self) -> None:
        self.budget = self.budget.halved()
        self._until_growth, self._patience = self._patience, 2 * self._patience
        self.teacher.logit_rows = self.budget.logit_rows
        _empty_cache()
        now = f"{self.budget.tokens} tokens and {self.budget.logit_rows} logit rows"
        logger.warning("Out of memory: continuing with batches of %s", now)


def _empty_cache() -> None:
    """Free the memory that a failed attempt has left reserved."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def _difference(found: Distributions, rows: slice, alone: Distributions) -> float:
    """Root mean square difference of the target log-probabilities, or of the logsumexps if larger, in nats."""
    with np.errstate(invalid="ignore"):  # both may be -inf
        errors = [
            np.where(there == here, 0, there - here)
            for there, here in (
                (found.token_log_probs[rows], alone.token_log_probs),
                (found.logsumexp[rows], alone.logsumexp),
            )
        ]
    return float(max(np.sqrt(np.square(error).mean()) for error in errors))
