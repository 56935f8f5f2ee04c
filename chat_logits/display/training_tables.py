"""How a student came closer to its teacher, as a table with a bar for each measurement."""

from rich.console import Console

from chat_logits.display.tables import LEAST_BAR, Column, Table, bar, numbers, print_table, print_title
from chat_logits.training.record import TrainingResult
from chat_logits.words import error_text

BAR = 18  # cells of the largest KL
SPARE = ("", "Of the tail", "Agreement")


def print_training(result: TrainingResult, console: Console) -> None:
    """Print what was measured on held-out conversations, in lines that fit."""
    positions = result.points[0][1].positions
    print_title(f"Forward KL to {result.rows.measured_to} on {positions:,} held-out tokens", console)
    table = measurements_table(result)
    largest = max(point.kl for _, point in result.points)

    def bars(width: int) -> list[str]:
        return [bar(max(0.0, point.kl) / largest, width) if largest > 0 else "" for _, point in result.points]

    print_table(Table(table.title, [*table.columns, Column("", bars, LEAST_BAR, BAR)], SPARE), console)


def measurements_table(result: TrainingResult) -> Table:
    """The measurements, one per row."""
    points = [point for _, point in result.points]
    columns = [
        numbers("Step", [f"{step:,}" for step, _ in result.points]),
        numbers("KL, nats", [f"{point.kl:.4f}" for point in points]),
        numbers("±", [error_text(point.error) for point in points]),
        numbers("Of the tail", [f"{point.kl_tail:.4f}" for point in points]),
        numbers("Agreement", [f"{point.agreement:.1%}" for point in points]),
    ]
    return Table("Measured on held-out conversations", columns)
