"""How a student came closer to its teacher, as a table with a bar for each measurement."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from chat_logits.training.distance import Distance
from chat_logits.words import error_text

BAR = 18  # characters of the largest KL: a line has 80


def print_training(points: Sequence[tuple[int, Distance]], console: Console | None = None) -> None:
    """Print steps and what ``Distance`` says after them."""
    largest = max(point.kl for _, point in points) or 1.0
    table = Table(title=f"Forward KL to the teacher on {points[0][1].positions:,} held-out tokens")
    for name in ("Step", "KL, nats", "±", "Of the tail", "Agreement"):
        table.add_column(name, justify="right")
    table.add_column("")
    for step, point in points:
        bar = "█" * max(1, round(BAR * point.kl / largest))
        nats = f"{point.kl:.4f}", error_text(point.error), f"{point.kl_tail:.4f}"
        table.add_row(f"{step:,}", *nats, f"{point.agreement:.1%}", bar)
    (console or Console()).print(table)
