"""The page and the table of a training: of measurements around 0, in narrow terminals and pipes; a student's page as
one of several."""

import io
import math
import re

import pytest
from rich.console import Console

from chat_logits.display.results import shown
from chat_logits.display.tables import PipeConsole
from chat_logits.display.training_page import training_page
from chat_logits.display.training_tables import print_training
from chat_logits.training.config import TrainConfig
from chat_logits.training.distance import Distance
from chat_logits.training.record import Student, TaughtRows, TrainingResult
from chat_logits.training.student_report import StudentGroup, StudentReport

TEACHER = "user/teacher"


def result_of(*points: tuple[float, float], losses: tuple[float, ...] = (), **options) -> TrainingResult:
    """A training with these held-out KLs and their errors, a step apart."""
    rows = TaughtRows(teacher=TEACHER, fingerprint="f" * 64, num_rows=20, revision=None, num_sampled=16)
    config = TrainConfig(logit_dataset_id="rows", student_id="student", output_dir="out", **options)
    distances = [Distance(3, 100, kl, error, kl / 2, 0.5) for kl, error in points]
    student = Student("student", "s" * 64)
    return TrainingResult(config, rows, student, points=[*enumerate(distances)], losses=[*enumerate(losses, 1)])


def heights(page: str) -> tuple[float, list[float]]:
    """The y of the axis, and all that is drawn in the first figure, downwards."""
    figure = page.partition("<svg")[2].partition("</svg>")[0]
    (bottom,) = re.findall(r'<path class="grid" d="M46 ([\d.]+)H', figure)[:1]
    points = [pair.split(",")[1] for line in re.findall(r'points="([^"]*)"', figure) for pair in line.split()]
    marks = re.findall(r'cy="([^"]*)"', figure)
    whiskers = re.findall(r'class="error" d="M\S+ (\S+)V([^M]+)M', figure)
    return float(bottom), [float(one) for one in (*points, *marks, *(y for pair in whiskers for y in pair))]


@pytest.mark.parametrize(
    ("points", "losses"),
    [
        ([(-0.0002, 0.0001), (-0.0003, 0.0001)], (-0.0001,)),  # all below 0, errors included
        ([(-0.0002, math.nan)], ()),
        ([(0.0, 0.0), (-0.1, 0.0)], (-0.2, -0.3)),
    ],
)
def test_where_all_is_at_or_below_zero_it_is_drawn_at_zero(points, losses):
    bottom, drawn = heights(training_page(result_of(*points, losses=losses)))
    assert len(drawn) >= 2 and set(drawn) == {bottom}


def test_values_below_zero_stay_within_the_axes_and_are_told():
    page = training_page(result_of((0.4, 0.01), (-0.1, 0.2), losses=(0.3, -0.2)))
    bottom, drawn = heights(page)
    assert max(drawn) == bottom and sorted(drawn)[0] >= 12
    assert "<title>step 1: -0.1000 ± 0.2000</title>" in page


def printed(result: TrainingResult, console_of=Console, **options) -> list[str]:
    file = io.StringIO()
    print_training(result, console_of(file=file, **options))
    return file.getvalue().splitlines()


def test_bars_are_as_long_as_the_kl_and_none_is_drawn_below_zero():
    title, _, head, _, *lines = printed(result_of((0.4, 0.01), (0.2, 0.01), (-0.1, 0.01)), force_terminal=False)
    assert title == "Forward KL to the teacher on 100 held-out tokens"
    assert [part.strip() for part in head.split("|")][:5] == ["Step", "KL, nats", "±", "Of the tail", "Agreement"]
    assert [line.count("█") for line in lines] == [18, 9, 0]
    below = printed(result_of((-0.3, 0.01), (-0.1, 0.01)), force_terminal=False)
    assert not any("█" in line for line in below) and "-0.3000" in "".join(below)


@pytest.mark.parametrize("width", [80, 44, 30])
def test_its_lines_fit_the_terminal_and_a_pipe_cuts_none(width):
    result = result_of((0.4, 0.01), (0.2, 0.01))
    lines = printed(result, force_terminal=True, width=width, color_system=None)
    assert max(map(len, lines[1:])) <= width and "0.4000" in lines[4]
    piped = printed(result, PipeConsole, width=width)
    assert "█" * 18 in piped[4] and "Agreement" in piped[2]


def test_what_was_trained_on_is_said_where_it_is_more_than_is_measured():
    options = {"losses": (0.3, 0.2)}
    points = (0.4, 0.01), (0.2, 0.01)
    assert "the loss, with ends of turns that were not extracted." in training_page(result_of(*points, **options))
    both = training_page(result_of(*points, **options, hard_weight=0.1))
    assert "with ends of turns that were not extracted and the text&#39;s share (hard_weight)." in both
    assert "Trained on: the loss" not in training_page(result_of(*points, **options, end_of_turn="skip"))


def test_a_students_page_can_be_one_of_several():
    whole = StudentGroup(1, 10, 0.1, math.nan, 0.01, 0.9, "all", 1.0)
    groups = {f"by_{kind}": [whole] for kind in ("class", "turn", "position", "entropy")}
    names = {"dataset_id": "rows", "teacher_id": TEACHER, "student_id": "student", "dtype": "float32", "device": "cpu"}
    report = shown(StudentReport(**names, **groups, num_rows=1, whole=whole, ends_left_out=0, worst=[]))
    page = report.to_html({"home": "/", "place": "12 of 340"})
    assert '<a href="/">All conversations</a>' in page and "12 of 340" in page
    assert "All conversations" not in report.to_html()
