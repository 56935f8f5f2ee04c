"""A training as a page: how the student came closer to its teacher, and what it was trained with."""

import math
from collections.abc import Sequence
from typing import Any

from chat_logits.display.dataset_page import table_figure
from chat_logits.display.page import render_page
from chat_logits.display.tables import Table, labels
from chat_logits.display.training_tables import measurements_table
from chat_logits.training.record import TrainingResult
from chat_logits.words import count_text, with_error

WIDTH, HEIGHT = 420, 270  # units of a figure
LEFT, TOP, RIGHT, BOTTOM = 46, 12, 16, 40  # units around its curves: room for labels
TICKS = 5  # about so many on an axis
STEPS = (1, 2, 2.5, 5, 10)  # distances between ticks, times a power of ten


def training_page(result: TrainingResult) -> str:
    """The page of a training, with at least one measurement."""
    kl = [(step, point.kl, point.error) for step, point in result.points]
    agreement = [(step, point.agreement, math.nan) for step, point in result.points]
    curves = [("held_out", [(step, value) for step, value, _ in kl])]
    if result.losses:
        curves.append(("trained_on", result.losses))
    return render_page(
        "training.html.jinja",
        title=f"A student of {result.rows.teacher}",
        subtitle=f"{result.config.student_id}, trained on {result.config.logit_dataset_id}",
        tiles=_tiles(result),
        figures=[
            _curve(f"Forward KL to {result.rows.measured_to}, nats a token", kl, curves, "{:.4f}", _note(result)),
            _curve("Most probable token is the teacher's", agreement, [("held_out", _pairs(agreement))], "{:.1%}"),
            table_figure(_settings(result), span=6),
            table_figure(measurements_table(result), span=6),
        ],
    )


def _note(result: TrainingResult) -> str:
    """How the two curves differ, if they do."""
    config = result.config
    of_text = ["ends of turns that were not extracted"] * (config.end_of_turn == "hard")
    of_text += ["the text's share (hard_weight)"] * (config.hard_weight > 0)
    if not result.losses or not of_text:
        return ""
    return f"Held out: at extracted tokens alone. Trained on: the loss, with {' and '.join(of_text)}."


def _pairs(points: Sequence[tuple[int, float, float]]) -> list[tuple[int, float]]:
    return [(step, value) for step, value, _ in points]


def _tiles(result: TrainingResult) -> list[tuple[str, str]]:
    (_, first), (steps, last) = result.points[0], result.points[-1]
    speed = result.tokens_per_second
    return [
        ("Held-out KL before", with_error(first.kl, first.error)),
        (f"After {steps:,} step{'s' * (steps != 1)}", with_error(last.kl, last.error)),
        ("Agreement before", f"{first.agreement:.1%}"),
        ("After", f"{last.agreement:.1%}"),
        ("Held out", f"{count_text(last.conversations, 'conversation')}, {count_text(last.positions, 'token')}"),
        *([("Tokens a second", f"{speed:,.0f}")] if speed else []),
    ]


# --- curves ---


def _curve(
    title: str,
    marks: Sequence[tuple[int, float, float]],
    curves: Sequence[tuple[str, Sequence[tuple[int, float]]]],
    number: str,
    note: str = "",
) -> dict:
    """A figure of curves over steps, each a kind and its points, with marks (step, value, standard error or nan).

    Values below 0, possible for the estimate of a KL near 0, are drawn at 0.
    """
    highest = max(value + (0 if math.isnan(error) else error) for _, value, error in marks)
    highest = max([0.0, highest, *(value for _, points in curves for _, value in points)]) or 1.0
    steps = max([step for _, points in curves for step, _ in points]) or 1
    y_ticks, x_ticks = _ticks(highest), [tick for tick in _ticks(steps) if tick <= steps and tick == int(tick)]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(step: float) -> float:
        return round(LEFT + (right - LEFT) * step / steps, 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - TOP) * max(0.0, value) / y_ticks[-1], 1)

    shown = number.replace(".4f", "g").replace(".1%", ".0%")
    return {
        "kind": "curve",
        "span": 6,
        "title": title,
        "note": note,
        "summary": "; ".join(f"step {step:,}: {number.format(value)}" for step, value, _ in marks),
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": right,
        "bottom": bottom,
        "x_ticks": [(x(tick), f"{int(tick):,}") for tick in x_ticks],
        "y_ticks": [(y(tick), shown.format(tick)) for tick in y_ticks],
        "curves": [
            {"kind": kind, "points": [{"x": x(step), "y": y(value)} for step, value in points]}
            for kind, points in curves
        ],
        "marks": [_mark(x(step), y, step, value, error, number) for step, value, error in marks],
    }


def _mark(at: float, y: Any, step: int, value: float, error: float, number: str) -> dict:
    has_error = not math.isnan(error)
    told = f"step {step:,}: {number.format(value)}" + (f" ± {number.format(error)}" if has_error else "")
    low, high = (y(value - error), y(value + error)) if has_error else (None, None)
    return {"x": at, "y": y(value), "low": low, "high": high, "title": told}


def _ticks(most: float) -> list[float]:
    """Round numbers from 0 to ``most`` or the next one above.

    >>> _ticks(40), _ticks(0.37)
    ([0.0, 10.0, 20.0, 30.0, 40.0], [0.0, 0.1, 0.2, 0.3, 0.4])
    """
    power = 10.0 ** math.floor(math.log10(most / TICKS))
    apart = next(step * power for step in STEPS if step * power * TICKS >= most * (1 - 1e-9))
    return [float(f"{apart * i:.6g}") for i in range(math.ceil(most / apart - 1e-9) + 1)]


# --- tables ---


def _settings(result: TrainingResult) -> Table:
    settings = {"teacher": result.rows.teacher, **result.settings()}
    columns = [labels("Option", list(settings)), labels("Value", [str(value) for value in settings.values()])]
    return Table("Settings that were chosen", columns)
