"""How far a student is from its teacher, by kinds of position: tables for the terminal and for the page."""

from rich.console import Console

from chat_logits.display.tables import (
    LEAST_BAR,
    Column,
    Table,
    bar,
    labels,
    numbers,
    print_line,
    print_parts,
    print_table,
)
from chat_logits.display.text import line_of, quoted, visible
from chat_logits.training.student_report import StudentConversation, StudentGroup, StudentReport
from chat_logits.words import count_text, error_text, with_error

BAR = 24  # cells
SPARE = ("", "Conversations", "Of the tail", "Share of KL", "Agreement")


def print_student(report: StudentReport, console: Console) -> None:
    """Print the totals, each breakdown, and the student's worst conversations, in lines that fit."""
    print_line(f"{line_of(report.student_id)} on {line_of(report.dataset_id)}", console, "bold")
    print_line(visible(f"Teacher {report.teacher_id}; student in {report.dtype} on {report.device}"), console)
    whole = report.whole
    parts = [
        f"{looked_at(report)}, {count_text(whole.positions, 'target token')}",
        f"forward KL {with_error(whole.kl, whole.error)} nats a token, {whole.kl_tail:.4f} of it by the tail's draws",
        f"agreement {whole.agreement:.1%}",
    ]
    print_parts(parts, console)
    if report.ends_left_out:
        print_line(left_out_text(report), console)
    for title, groups in breakdowns(report).items():
        console.print()
        print_line(title, console, "bold")
        print_table(_groups_table(title, groups), console)
    console.print()
    table = worst_table(report.worst)
    print_line(table.title, console, "bold")
    print_table(table, console)


def breakdowns(report: StudentReport) -> dict[str, list[StudentGroup]]:
    """The groups of positions by their titles."""
    return {
        "By kind of target token": report.by_class,
        "By the assistant's turn": report.by_turn,
        "By place among a turn's extracted tokens": report.by_position,
        "By the teacher's entropy, nats, its tail as one entry": report.by_entropy,
    }


def looked_at(report: StudentReport) -> str:
    """How many conversations, and of how many if these are not all."""
    count = report.whole.conversations
    of_all = f"{count:,} of " if count != report.num_rows else ""
    return f"{of_all}{count_text(report.num_rows, 'conversation')}"


def left_out_text(report: StudentReport) -> str:
    """What is not in the figures."""
    ends = count_text(report.ends_left_out, "end")
    return f"Left out: {ends} of turns that were not extracted, so that no distribution is stored for them."


def group_columns(groups: list[StudentGroup]) -> list[Column]:
    """The columns of groups, as numbers."""
    return [
        labels("Positions", [group.name for group in groups]),
        numbers("KL, nats", [f"{group.kl:.4f}" for group in groups]),
        numbers("±", [error_text(group.error) for group in groups]),
        numbers("Of the tail", [f"{group.kl_tail:.4f}" for group in groups]),
        numbers("Agreement", [f"{group.agreement:.1%}" for group in groups]),
        numbers("Tokens", [f"{group.positions:,}" for group in groups]),
        numbers("Conversations", [f"{group.conversations:,}" for group in groups]),
        numbers("Share of KL", [f"{group.share:.1%}" for group in groups]),
    ]


def _groups_table(title: str, groups: list[StudentGroup]) -> Table:
    largest = max(group.kl for group in groups)

    def bars(width: int) -> list[str]:
        return [bar(max(0.0, group.kl) / largest, width) if largest > 0 else "" for group in groups]

    return Table(title, [*group_columns(groups), Column("", bars, LEAST_BAR, BAR)], SPARE)


def worst_table(worst: list[StudentConversation]) -> Table:
    """The conversations with the largest mean KL."""
    columns = [
        numbers("Row", [f"{each.sample_index}" for each in worst]),
        numbers("Source row", [f"{each.source_index}" for each in worst]),
        numbers("Tokens", [f"{each.positions:,}" for each in worst]),
        numbers("Mean KL", [f"{each.kl:.4f}" for each in worst]),
        numbers("Of the tail", [f"{each.kl_tail:.4f}" for each in worst]),
        numbers("Agreement", [f"{each.agreement:.1%}" for each in worst]),
        Column("Question", [quoted(each.question, space=" ") for each in worst], 8, 80),
    ]
    return Table(
        "Conversations with the largest mean KL", columns, ("Source row", "Of the tail", "Agreement", "Tokens")
    )
