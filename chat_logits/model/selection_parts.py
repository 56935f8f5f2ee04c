"""Selection with an lm_head split by vocabulary over the processes of a group: only what is needed is sent.

Each process converts its own part of the logits to float32 and ranks its best K entries; the group's first process
merges. With N processes, and K and S as in ``SelectionSettings``, for each position, all to or from the first process:

    gather     the part's largest logit, the target token's logit, and at most N of its K best, evenly spaced
    broadcast  the largest logit of all, and an entry that at least K entries reach (they are equal or better)
    gather     the part's sum of exponentials, and its entries that reach that one: K to 2 K from all parts together
    scatter    how many of them are kept; the part removes those from its mass
    gather     the part's tail mass
    scatter    the tail mass before the part and of all parts, and which draws have their threshold in the part
    gather     those draws

Exponentials are relative to the largest logit of all, as in one process, and an entry is an int64 that sorts by logit
and then by id, lowest first. So N changes only the rounding of sums. All processes together send, for each position, at
most 8 · (2 K + S) bytes of entries and draws, and (N - 1) · (60 + 8 N) bytes of the rest.
"""

from typing import Any

import torch

from chat_logits.errors import ToolkitError
from chat_logits.model.collectives import Messages
from chat_logits.model.selection import BLOCK, SelectionSettings, block_sums, draw_thresholds, nucleus_cut, search
from logit_codec import ABSENT, MAX_TOKEN_ID

NO_ENTRY = -(2**63)  # sorts below every logit
LOW = 2**32 - 1  # the bits of an entry that hold its id, or a draw's mass
RANKED_BLOCK = 32  # logits in a block; only blocks with the largest maxima are ranked entry by entry
RANKED_AT_ONCE = 2**18  # logits that are ranked entry by entry at once, so that the data stays in a CPU's cache
DRAWN_AT_ONCE = 2**17  # likewise, logits in the blocks of draws
TIMES_ON_CUDA = 16  # times as many at once on CUDA: 250 MB, and few launches


@torch.inference_mode()
def select_in_parts(
    logits: torch.Tensor,
    first_id: int,
    vocabulary: int,
    tokens: torch.Tensor,
    uniforms: torch.Tensor,
    settings: SelectionSettings,
    group: Any,
) -> dict[str, torch.Tensor] | None:
    """As ``selection.select``, called by every process of a torch.distributed ``group`` with its part of the logits.

    ``logits`` (R, V_part) are those of ids from ``first_id`` on, and may be overwritten. Columns past ``vocabulary``
    are ignored, and a part may be empty. The parts follow one another in the order of the group's ranks. ``tokens``
    (R,) int64 and ``uniforms`` (R,) float64 are the same in all processes. The group's first process gets the fields of
    ``Distributions`` on its logits' device, the others None. Raises ToolkitError if the parts do not make up the
    vocabulary. On CUDA this synchronizes with the host, which has to know how many entries and draws are sent.
    """
    messages, part = Messages(group), _Part(logits, first_id, vocabulary, settings)
    first = _First(uniforms, settings) if messages.is_first else None

    told = messages.gather(part.ids, part.highest, part.target(tokens), part.landmarks(messages.size))
    agreed = messages.broadcast(first.agree(*told) if first else None, part.agreement(messages.size))
    _check_order(agreed[0].tolist(), vocabulary)
    part.weigh(*agreed[1:])

    told = messages.gather(part.total, part.count(part.chosen))
    places = first.places(*told) if first else None
    entries = messages.gather_some(part.best, part.chosen, places, NO_ENTRY)
    part.take_off(*messages.scatter(first.merge(entries) if first else None, [part.count(part.chosen)]))

    draws = None
    if settings.num_sampled:
        told = messages.gather(part.sum_tail())
        asked = messages.scatter(first.share_out(*told) if first else None, part.shares())
        draws = messages.gather_some(*part.draw(uniforms, *asked), first.asked if first else None, NO_ENTRY)
    return first.results(draws) if first else None


class _Part:
    """A process' own part of the logits, float32 (R, W) for the ids from ``first_id`` on."""

    def __init__(self, logits: torch.Tensor, first_id: int, vocabulary: int, settings: SelectionSettings):
        width = max(0, min(logits.shape[1], vocabulary - first_id))
        self._logits, self._first_id = logits[:, :width].float(), first_id
        self._storable = max(0, min(width, MAX_TOKEN_ID - first_id))
        self._settings = settings
        self.ids = torch.tensor([min(first_id, vocabulary), width], dtype=torch.int32, device=logits.device)
        self.highest = self._logits.amax(dim=1) if width else self._logits.new_full((len(logits),), -torch.inf)
        self.best = _ranked(self._logits[:, : self._storable], first_id, settings.top_k)

    def target(self, tokens: torch.Tensor) -> torch.Tensor:
        """The target tokens' logits (R,), +inf for tokens in another part."""
        column, width = tokens - self._first_id, self._logits.shape[1]
        if not width:
            return torch.full_like(self.highest, torch.inf)
        found = self._logits.gather(1, column.clamp(0, width - 1)[:, None])[:, 0]
        return found.where((column >= 0) & (column < width), torch.inf)

    def landmarks(self, num_parts: int) -> torch.Tensor:
        """At most N of the part's K best entries (R, K): the last of every ceil(K / N)."""
        step = _step(self._settings.top_k, num_parts)
        return self.best[:, step - 1 :: step]

    def agreement(self, num_parts: int) -> list[torch.Tensor]:
        """Tensors with the shapes and dtypes of what ``_First.agree`` returns."""
        return [self.ids.new_empty(num_parts, 2), self.highest, self.best[:, 0]]

    def weigh(self, highest: torch.Tensor, least: torch.Tensor) -> None:
        """Replace the logits by exponentials, and choose the best entries that reach ``least`` (R,)."""
        self._mass = self._logits.sub_(highest[:, None]).exp_()
        self.total = block_sums(self._mass).sum(dim=1)
        self.chosen = (self.best >= least[:, None]) & (self.best > NO_ENTRY)

    def count(self, chosen: torch.Tensor) -> torch.Tensor:
        return chosen.sum(dim=1).to(_small(self._settings))

    def take_off(self, num_kept: torch.Tensor) -> None:
        """Set the mass of the first ``num_kept`` (R,) of the best entries to 0."""
        if not self._storable:
            return
        column = (_ids(self.best) - self._first_id).clamp(0, self._storable - 1)
        is_kept = torch.arange(column.shape[1], device=column.device) < num_kept[:, None]
        first = column[:, :1]  # entries that are not kept write this column's correct value there
        left = self._mass.gather(1, first) * (num_kept == 0)[:, None]
        self._mass.scatter_(1, column.where(is_kept, first), left.expand_as(column))

    def sum_tail(self) -> torch.Tensor:
        """The remaining storable mass, float64 (R,)."""
        self._sums = block_sums(self._mass[:, : self._storable])
        self._running = self._sums.cumsum(dim=1)
        return self._running[:, -1] if self._storable else self._sums.sum(dim=1)

    def shares(self) -> list[torch.Tensor]:
        """Tensors with the shapes and dtypes of what ``_First.share_out`` returns, for one part."""
        numbers = self.highest.double()
        return [numbers, numbers, numbers.to(_small(self._settings)), numbers.to(_small(self._settings))]

    def draw(
        self, uniforms: torch.Tensor, before: torch.Tensor, left: torch.Tensor, begin: torch.Tensor, end: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The draws (R, S) as entries of id and mass, and which are asked for: those from ``begin`` up to ``end``."""
        num_sampled, device = self._settings.num_sampled, uniforms.device
        asked = torch.arange(num_sampled, device=device)
        asked = (asked >= begin[:, None]) & (asked < end[:, None])
        if not self._storable:
            return torch.zeros_like(asked, dtype=torch.int64), asked
        thresholds = draw_thresholds(uniforms, left[:, None], num_sampled)
        columns = (self._mass[:, : self._storable], self._sums, before[:, None] + self._running, thresholds)
        at_once = _rows_at_once(DRAWN_AT_ONCE, num_sampled * BLOCK, device)
        drawn = [search(*rows) for rows in zip(*(column.split(at_once) for column in columns), strict=True)]
        ids, masses = (torch.cat(pieces) for pieces in zip(*drawn, strict=True))
        return (ids + self._first_id) << 32 | masses.float().view(torch.int32).long() & LOW, asked


class _First:
    """What the group's first process does with the data of the parts, stacked as (N, R, …)."""

    def __init__(self, uniforms: torch.Tensor, settings: SelectionSettings):
        self._uniforms, self._settings = uniforms, settings

    def agree(
        self, ids: torch.Tensor, highest: torch.Tensor, target: torch.Tensor, landmarks: torch.Tensor
    ) -> list[torch.Tensor]:
        """All parts' first ids and widths, the largest logit (R,), and an entry (R,) that at least K entries reach."""
        self._highest, self._target = highest.amax(dim=0), target.amin(dim=0)
        step = _step(self._settings.top_k, len(ids))
        needed = -(-self._settings.top_k // step)
        ranked = landmarks.transpose(0, 1).flatten(1).topk(needed).values
        return [ids, self._highest, ranked[:, -1]]

    def places(self, totals: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Where the parts' entries are placed, bool (N, R, K)."""
        self._logsumexp = self._highest.double() + totals.sum(dim=0).log()
        return torch.arange(self._settings.top_k, device=counts.device) < counts[:, :, None]

    def merge(self, entries: torch.Tensor) -> list[torch.Tensor]:
        """How many of each part's entries (N, R, K) are kept, (N, R)."""
        top_k = self._settings.top_k
        best, place = entries.transpose(0, 1).flatten(1).topk(top_k)
        values = _values(best)
        probs = (values.double() - self._logsumexp[:, None]).exp()
        kept = nucleus_cut(probs, self._settings.top_p) & torch.isfinite(values) & (best > NO_ENTRY)
        self._top = {"top_ids": _ids(best).where(kept, ABSENT), "top_probs": probs.where(kept, 0.0)}
        of_part = place // top_k == torch.arange(len(entries), device=place.device)[:, None, None]
        return [(of_part & kept).sum(dim=2).to(_small(self._settings))]

    def share_out(self, tails: torch.Tensor) -> list[torch.Tensor]:
        """By part (N, R): the tail mass before it, that of all parts, and the range of draws that belongs to it."""
        ends = tails.cumsum(dim=0)
        left = ends[-1]
        thresholds = draw_thresholds(self._uniforms, left[:, None], self._settings.num_sampled)
        order = torch.arange(len(tails), device=tails.device)[:, None]
        # A threshold that rounding puts past the end belongs to the last part with mass.
        last = ((tails > 0) * order).amax(dim=0)
        owner = torch.minimum((ends[:, :, None] <= thresholds).sum(dim=0), last[:, None])
        drawn = (left > 0)[:, None]
        self.asked = (owner == order[:, :, None]) & drawn
        bounds = [((owner < order[:, :, None] + more) & drawn).sum(dim=2).to(_small(self._settings)) for more in (0, 1)]
        before = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
        return [before, left.expand_as(ends), *bounds]

    def results(self, draws: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The fields of ``Distributions``. Of the draws (N, R, S), each comes from at most one part."""
        drawn = self._top["top_ids"].new_empty(len(self._highest), 0) if draws is None else draws.amax(dim=0)
        masses = (drawn & LOW).int().view(torch.float32).double()
        to_probability = (self._highest.double() - self._logsumexp).exp()[:, None]
        return {
            **self._top,
            "sampled_ids": (drawn >> 32).where(drawn > NO_ENTRY, ABSENT),
            "sampled_probs": masses * to_probability,
            "logsumexp": self._logsumexp,
            "token_log_probs": self._target.double() - self._logsumexp,
        }


def _check_order(parts: list[list[int]], vocabulary: int) -> None:
    ends = [0, *(first + width for first, width in parts)]
    if [first for first, _ in parts] != ends[:-1] or ends[-1] != vocabulary:
        found = ", ".join(f"{width:,} from id {first:,} on" for first, width in parts)
        raise ToolkitError(
            f"the parts of the logits are {found}; expected parts that follow one another in the order of the "
            f"processes, {vocabulary:,} ids in all"
        )


def _step(top_k: int, num_parts: int) -> int:
    """How many of a part's best entries there are for each landmark, which is the last of them."""
    return -(-top_k // num_parts)


def _small(settings: SelectionSettings) -> torch.dtype:
    """The dtype of counts up to K and S."""
    return torch.int16 if max(settings.top_k, settings.num_sampled) < 2**15 else torch.int32


def _rows_at_once(numbers: int, numbers_a_row: int, device: torch.device) -> int:
    return max(1, numbers * (TIMES_ON_CUDA if device.type == "cuda" else 1) // numbers_a_row)


def _entries(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 entries that sort by float32 value; among equal values, the lower id (0 to 2**32 - 1) is larger."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 is 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32 | (LOW - ids)


def _ids(entries: torch.Tensor) -> torch.Tensor:
    return LOW - (entries & LOW)


def _values(entries: torch.Tensor) -> torch.Tensor:
    bits = (entries >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _ranked(logits: torch.Tensor, first_id: int, top_k: int) -> torch.Tensor:
    """The K best entries (R, K) of logits (R, W) for ids from ``first_id`` on, best first, padded with ``NO_ENTRY``."""
    num_blocks = min(top_k, -(-logits.shape[1] // RANKED_BLOCK))
    if not num_blocks:
        return torch.full((len(logits), top_k), NO_ENTRY, dtype=torch.int64, device=logits.device)
    at_once = _rows_at_once(RANKED_AT_ONCE, num_blocks * RANKED_BLOCK, logits.device)
    ranked = torch.cat([_ranked_in_blocks(rows, first_id, top_k, num_blocks) for rows in logits.split(at_once)])
    return torch.nn.functional.pad(ranked, (0, top_k - ranked.shape[1]), value=NO_ENTRY)


def _ranked_in_blocks(logits: torch.Tensor, first_id: int, top_k: int, num_blocks: int) -> torch.Tensor:
    """As ``_ranked``. The best entries are in the ``num_blocks`` blocks with the best maxima."""
    width, device = logits.shape[1], logits.device
    maxima = _block_maxima(logits)
    blocks = _ids(_entries(maxima, torch.arange(maxima.shape[1], device=device)).topk(num_blocks).values)
    column = (blocks[:, :, None] * RANKED_BLOCK + torch.arange(RANKED_BLOCK, device=device)).flatten(1)
    values = logits.gather(1, column.clamp(max=width - 1))
    entries = _entries(values, first_id + column)
    entries.masked_fill_((column >= width) | (values == -torch.inf), NO_ENTRY)
    return entries.topk(min(top_k, num_blocks * RANKED_BLOCK)).values


def _block_maxima(logits: torch.Tensor) -> torch.Tensor:
    """float32 (R, ceil(W / RANKED_BLOCK))."""
    whole = logits.shape[1] // RANKED_BLOCK * RANKED_BLOCK
    maxima = logits[:, :whole].unflatten(1, (-1, RANKED_BLOCK)).amax(dim=2) if whole else logits[:, :0]
    if whole == logits.shape[1]:
        return maxima
    return torch.cat([maxima, logits[:, whole:].amax(dim=1, keepdim=True)], dim=1)
