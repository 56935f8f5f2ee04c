"""Estimates before a run: memory on each card, the fewest cards on which a model runs sensibly, and the time.

Memory follows ``memory.py``; time is floating-point operations at a stated share of the card's peak.
"""

from dataclasses import dataclass, replace

import torch

from chat_logits.model.batch_plan import Budget
from chat_logits.model.cards import DEFAULT_CARD, Card, card_named, known_peak
from chat_logits.model.devices import choose_device
from chat_logits.model.memory import PeakParts, budget_for, peak_parts, total_memory
from chat_logits.model.shape import Shape

CARDS_A_WORKER = (1, 2, 4, 8)  # of one machine; they divide its eight cards
UTILISATION = 0.40  # of the peak
MEASURED = "8B reached 44% on an H200 (benchmarks/RESULTS.md)"
HOST_RATE = 198_900  # tokens per second that one worker reads if the model takes almost no time
HOST_MEASURED = "0.5B on an H200 with 16 cores (benchmarks/RESULTS.md)"
# In a batch: with fewer, reading the weights takes more than a ninth of its time, 0.4 · (989/3.35) / 1,024 on an H100.
LEAST_TOKENS = 1024


def choose_card(name: str | None, device: str | None = None) -> Card:
    """The card of this name or memory size; for None the ``device`` here, or an H100 if there is no accelerator.

    Raises UsageError for any other name, or a device that does not exist here.
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
    """What each of the ``cards`` cards of one worker holds at its peak, in bytes.

    ``is_shared`` says that they share each layer, by the model's plan; else each has its own layers and they work one
    after the other. ``budget`` is the budget of a batch, which should hold ``wanted`` tokens.
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
        """How many processes share each layer and work at the same time."""
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
    """What each of these cards holds; activations, cache and logits as for a process with the whole model."""
    weights = shape.weight_bytes(cards) if is_shared else -(-shape.weight_bytes() // cards)
    room = max(0, card.memory - weights)
    budget = budget_for(shape.model, room, card.device_type, batching.batch_tokens, batching.logit_memory)
    kind, longest = card.device_type, batching.longest
    parts = peak_parts(shape.model, kind, budget, longest, budget.tokens, batching.prefix_cache)
    wanted = 1 if kind == "cpu" or batching.batch_tokens is not None else LEAST_TOKENS
    return Load(card, cards, is_shared, weights, parts, budget, wanted)


def smallest_load(shape: Shape, card: Card, is_shared: bool, batching: Batching) -> tuple[Load | None, str]:
    """The fewest cards of a machine on which the model runs sensibly, or None; and why fewer are not enough.

    ``is_shared`` says whether they share each layer, by the model's plan.
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
    """Why a load does not fit on its cards."""
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
    """The work for so many ``tokens`` read, ``pairs`` of tokens where one attends to the other, and ``extracted`` rows.

    Two operations for each parameter and token; of ``processes`` that share the model, the work of one. None for a
    mixture of experts that does not say how many experts a token goes to, or has them in an unknown form.
    """
    if (parameters := shape.active_in_layers(processes)) is None:
        return None
    sharing = 1 if shape.split(processes).is_attention_whole else processes
    head = shape.head.weight.numel() / processes
    return Work(
        round(2 * parameters * tokens), round(2 * shape.attended * pairs / sharing), round(2 * head * extracted)
    )


def seconds_of(work: Work, card: Card) -> float | None:
    """How long a card works at ``UTILISATION``; None if its peak is not known."""
    return None if card.peak is None else work.total / (UTILISATION * card.peak)
