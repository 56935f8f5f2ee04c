"""Budgets in the terminal: lines that fit it, and the columns that a narrow one leaves out."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from chat_logits.analysis.budget import Budget, BudgetLine
from chat_logits.display.budget_tables import print_budget

LINES = [
    BudgetLine(64, 16, 0.98, 168.1, 0.951, 0.0512, 0.0, 0.0312, 0.0, is_best=True),
    BudgetLine(16, 8, 0.95, 71.4, 0.902, 0.1034, 0.0123, 0.0401, 0.0, is_best=True),
    BudgetLine(64, 0, 0.98, 133.0, 0.951, 0.0512, None, None, 0.1234, bias_is_bound=True),
]


def printed(width: int) -> list[str]:
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    print_budget(Budget("outputs/demo", 64, 26_801, LINES), console)
    return buffer.getvalue().splitlines()


@pytest.mark.parametrize(
    ("width", "with_draws", "without"),
    [
        (
            100,
            ["K", "S", "P", "Bytes/token", "In nucleus", "Added", "In all"],
            ["K", "S", "P", "Bytes/token", "In nucleus", "Bias", "KL to the model"],
        ),
        (
            57,
            ["K", "S", "P", "Bytes/token", "Added", "In all"],
            ["K", "S", "P", "Bytes/token", "Bias", "KL to the model"],
        ),
        (40, ["K", "S", "P", "Bytes/token", "In all"], ["K", "S", "P", "Bytes/token", "Bias"]),
    ],
)
def test_lines_fit_a_terminal_with_the_columns_that_it_has_room_for(width, with_draws, without):
    lines = printed(width)
    assert max(map(cell_len, lines)) <= width
    heads = [[cell.strip() for cell in line.split("|")] for line in lines if line.count("|") > 2 and "K" in line]
    assert heads == [with_draws, without]
    row = [cell.strip() for cell in next(line for line in lines if "71.4" in line).split("|")]
    assert dict(zip(with_draws, row, strict=True))["In all"] == "0.0401"
