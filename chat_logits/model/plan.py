"""What a card holds of a model, on how few cards it runs sensibly, and how long it works: arithmetic before any run.

Memory follows ``memory.py``; time is floating-point operations at a stated share of the card's peak.
"""

from dataclasses import dataclass, replace

import torch

from chat_logits.model.batching import Budget
from chat_logits.model.cards import DEFAULT_CARD, Card, card_named, known_peak
from chat_logits.model.loading import choose_device
from chat_logits.model.memory import PeakParts, budget_for, peak_parts, total_memory
from chat_logits.model.shape import Shape

CARDS_A_WORKER = (1, 2, 4, 8)  # of one machine, whose eight they divide
UTILISATION = 0.40  # of the peak
MEASURED = "8B reached 44% on an H200 (benchmarks/RESULTS.md)"
HOST_RATE = 198_900  # tokens read a second by one worker whose model takes next to no time
HOST_MEASURED = "0.5B on an H200 with 16 cores (benchmarks/RESULTS.md)"
# Of a batch: with fewer, reading the weights takes more than a ninth of its time, 0.4 · (989/3.35) / 1,024 on an H100.
LEAST_TOKENS = 1024


def choose_card(name: str | None, device: str | None = None) -> Card:
    """The card of this name or size; for None the ``device`` here, and where no accelerator is here, an H100.

    Raises UsageError for a name that is neither, or a device that is not there.
    """
    if name is not None:
        return card_named(name)
    found = choose_device(device)
    if found.type == "cpu" and device is None:
        default = card_named(DEFAULT_CARD)
        return replace(default, source=f"{default.source}; no accelerator is here, and `plan_for` names none")
    called = torch.cuda.get_device_name(found) if found.type == "cuda" else str(found)
    return Card(called, total_memory(found), known_peak(called), "the device here", found.type)


@dataclass(frozen=True)
class Load:
    """What one of ``cards`` cards holds at its peak, in bytes; together they are one worker.

    ``is_shared`` says that they share each layer, by the model's plan; else each has layers of its own and they work
    one after the other. ``budget`` is a batch's, which should hold ``wanted`` tokens.
    """

    card: Card
    cards: int
    is_shared: bool
    weights: int
    parts: PeakParts
    budget: Budget
    wanted: int

    @property
    def total(self) -> int:
        return self.weights + sum(self.parts)

    @property
    def fits(self) -> bool:
        return self.total <= self.card.memory and self.budget.tokens >= self.wanted

    @property
    def processes(self) -> int:
        """How many share each layer, and work at a time."""
        return self.cards if self.is_shared else 1


@dataclass(frozen=True)
class Batching:
    """What decides how large a batch's logits, cache and activations are: options of the run, and the longest
    conversation's tokens."""

    batch_tokens: int | None = None
    logit_memory: int | None = None
    prefix_cache: bool = True
    longest: int = 512


def load_on(shape: Shape, card: Card, cards: int, is_shared: bool, batching: Batching) -> Load:
    """What each of these cards holds: activations, cache and logits as one process that has the whole model at work."""
    weights = shape.weight_bytes(cards) if is_shared else -(-shape.weight_bytes() // cards)
    room = max(0, card.memory - weights)
    budget = budget_for(shape.model, room, card.device_type, batching.batch_tokens, batching.logit_memory)
    kind, longest = card.device_type, batching.longest
    parts = peak_parts(shape.model, kind, budget, longest, budget.tokens, batching.prefix_cache)
    wanted = 1 if kind == "cpu" or batching.batch_tokens is not None else LEAST_TOKENS
    return Load(card, cards, is_shared, weights, parts, budget, wanted)


def smallest_load(shape: Shape, card: Card, is_shared: bool, batching: Batching) -> tuple[Load | None, str]:
    """The fewest cards of a machine on which the model runs sensibly, and why no fewer; None where all are too few.

    ``is_shared`` is whether they share each layer, by the model's plan.
    """
    why = ""
    for cards in CARDS_A_WORKER[: 1 if card.device_type == "cpu" else None]:
        if is_shared and (obstacle := shape.split(cards).obstacle):
            why = f"{why}; on {cards}: {obstacle}"
            continue
        load = load_on(shape, card, cards, is_shared, batching)
        if load.fits:
            return load, why.removeprefix("; ")
        why = f"{why}; on {cards}: {too_little(load)}"
    return None, why.removeprefix("; ")


def too_little(load: Load) -> str:
    """What a card lacks for a load that does not fit."""
    if load.weights >= load.card.memory:
        return f"{load.weights / 1e9:,.1f} GB of weights a card"
    if load.total > load.card.memory:
        return f"{load.total / 1e9:,.1f} GB a card"
    return f"room for batches of {load.budget.tokens:,} tokens, {load.wanted:,} wanted"


@dataclass(frozen=True)
class Work:
    """Floating-point operations: of the layers' parameters, of attention between tokens, and of the lm_head."""

    decoder: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.decoder + self.attention + self.head


def work_of(shape: Shape, tokens: float, pairs: float, extracted: float, processes: int = 1) -> Work | None:
    """For so many ``tokens`` read, ``pairs`` of tokens of which one sees the other, and ``extracted`` rows of logits.

    Two for each parameter and token, and of so many processes that share the model, those of one. None for a mixture
    that does not say how many experts a token goes to, or has them in a form that is not known.
    """
    if (parameters := shape.active_in_layers(processes)) is None:
        return None
    sharing = 1 if shape.split(processes).is_attention_whole else processes
    head = shape.head.weight.numel() / processes
    return Work(
        round(2 * parameters * tokens), round(2 * shape.attended * pairs / sharing), round(2 * head * extracted)
    )


def seconds_of(work: Work, card: Card) -> float | None:
    """How long a card works at ``UTILISATION``; None for one whose peak is not known."""
    return None if card.peak is None else work.total / (UTILISATION * card.peak)
