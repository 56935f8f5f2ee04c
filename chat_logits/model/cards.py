"""Accelerators by name: how much memory they have, and how fast they multiply. Nothing here needs torch."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from chat_logits.errors import UsageError

GIB = 2**30
DEFAULT_CARD = "h100-80gb"


class KnownCard(NamedTuple):
    """The memory in bytes that CUDA reports, rounded down to whole GiB; dense bfloat16 FLOP/s with float32
    accumulation, from the data sheet; and a pattern for the name that CUDA gives the card."""

    memory: int
    peak: float
    called: str


CARDS = {
    "h100-80gb": KnownCard(79 * GIB, 989e12, "H100 80GB HBM3"),
    "h200-141gb": KnownCard(139 * GIB, 989e12, r"\bH200\b"),
    "b200-180gb": KnownCard(178 * GIB, 2250e12, r"\bB200"),
    "a100-80gb": KnownCard(79 * GIB, 312e12, "A100.*80GB"),
    "a100-40gb": KnownCard(39 * GIB, 312e12, "A100.*40GB"),
    "l40s-48gb": KnownCard(44 * GIB, 362e12, "L40S"),
    "rtx4090-24gb": KnownCard(23 * GIB, 165e12, r"RTX 4090\b(?! [DL])"),
}
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B)?", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """An accelerator, or the CPU: its memory in bytes, its dense bfloat16 FLOP/s (None: not known), and where the
    memory figure is from."""

    name: str
    memory: int
    peak: float | None
    source: str
    device_type: str = "cuda"


def reported(name: str) -> str:
    """Where the memory figure of a known card is from."""
    return f"{CARDS[name].memory // GIB} GiB, what CUDA reports of it"


def card_named(name: str) -> Card:
    """The card of this name, or one with a memory size such as "80GiB". Raises UsageError for any other name."""
    if (known := CARDS.get(name.lower())) is None:
        return Card(name, read_size(name), None, "as given")
    return Card(name.lower(), known.memory, known.peak, reported(name.lower()))


def known_peak(device_name: str) -> float | None:
    """The peak of the card with this CUDA name; None if it is not listed, or is a part of a card (MIG).

    >>> known_peak("NVIDIA H100 80GB HBM3"), known_peak("NVIDIA H100 PCIe")
    (989000000000000.0, None)
    >>> known_peak("NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    """
    if " MIG " in device_name:
        return None
    return next((card.peak for card in CARDS.values() if re.search(card.called, device_name)), None)


def read_size(text: str) -> int:
    """The bytes in a text such as "80GiB". Raises UsageError for any other text.

    >>> read_size("80GiB"), read_size("24 GB")
    (85899345920, 24000000000)
    """
    found = SIZE.fullmatch(text.strip())
    if not found or not found[2]:
        raise UsageError(f"`plan_for` {text}: expected one of {', '.join(CARDS)}, or a size such as 80GiB")
    unit = found[2].upper()
    power = "BKMGT".index(unit[0])
    return int(float(found[1]) * (1024 if "I" in unit else 1000) ** power)
