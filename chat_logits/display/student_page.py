"""A student's distance from its teacher as a page, with a figure for each breakdown; the tables are the terminal's."""

from chat_logits.display.dataset_page import STYLES
from chat_logits.display.page import render_page
from chat_logits.display.student_tables import breakdowns, group_columns, left_out_text, looked_at, worst_table
from chat_logits.training.student_report import StudentGroup, StudentReport
from chat_logits.words import with_error


def student_page(report: StudentReport, frame: dict | None = None) -> str:
    """The page of a student's distance from its teacher. ``frame`` is as in ``token_page``, for one of several."""
    whole, worst = report.whole, worst_table(report.worst)
    row, source, *numbers, question = worst.columns  # the question goes to the front, so that a phone shows it
    columns = [row, question, *numbers, source]
    return render_page(
        "student.html.jinja",
        styles=STYLES,
        frame=frame,
        title=f"{report.student_id} on {report.dataset_id}",
        subtitle=f"Forward KL from {report.teacher_id}, by its stored distributions; student in {report.dtype} on "
        f"{report.device}",
        tiles=[
            ("Forward KL a token", f"{with_error(whole.kl, whole.error)} nats"),
            ("By the tail's draws", f"{whole.kl_tail:.4f} nats"),
            ("Agreement", f"{whole.agreement:.1%}"),
            ("Conversations", looked_at(report).removesuffix(" conversations").removesuffix(" conversation")),
            ("Target tokens", f"{whole.positions:,}"),
        ],
        note=left_out_text(report) if report.ends_left_out else "",
        figures=[_figure(title, groups) for title, groups in breakdowns(report).items()],
        worst={
            "title": worst.title,
            "columns": [(column.title, column.is_number) for column in columns],
            "rows": list(zip(*(column.cells for column in columns), strict=True)),
        },
    )


def _figure(title: str, groups: list[StudentGroup]) -> dict:
    """A breakdown: for each group a bar of its KL, the nucleus' part darker, with the numbers next to it."""
    largest = max((group.kl for group in groups), default=0.0)
    columns = group_columns(groups)
    return {
        "title": title,
        "columns": [(column.title, column.is_number) for column in columns],
        "rows": [
            {"cells": cells, "bar": _bar(group, largest)}
            for group, cells in zip(groups, zip(*(column.cells for column in columns), strict=True), strict=True)
        ],
    }


def _bar(group: StudentGroup, largest: float) -> dict:
    """Percent of the largest KL: the nucleus' part and, if both are positive, the tail's."""
    whole = max(0.0, group.kl) / largest if largest > 0 else 0.0
    tail = min(whole, max(0.0, group.kl_tail) / largest) if largest > 0 else 0.0
    words = f"{with_error(group.kl, group.error)} nats, {group.kl_tail:.4f} of them by the tail's draws"
    return {"nucleus": round(100 * (whole - tail), 2), "tail": round(100 * tail, 2), "title": words}
