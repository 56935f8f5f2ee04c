"""The table in terminals and pipes: columns line up, and nothing in a token acts on the terminal."""

import io
import math
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from chat_logits.analysis.conversation import Analysis
from chat_logits.analysis.tokens import EXTRACTED, PROMPT, SKIPPED, Prediction, TokenAnalysis
from chat_logits.display.formats import short_probability
from chat_logits.display.results import print_result
from chat_logits.display.tables import where
from chat_logits.display.text import quoted
from chat_logits.display.token_tables import print_preview


def extracted(text: str, rank: int | None, predictions: list[tuple[str, float]], log_prob=-0.5) -> TokenAnalysis:
    found = [Prediction(i, text, p) for i, (text, p) in enumerate(predictions)]
    return TokenAnalysis(9, 1, text, EXTRACTED, None, log_prob, rank, 31, 0.02, 1.5, found)


TOKENS = [
    *(TokenAnalysis(i, i, f"far{i}", PROMPT, "prompt") for i in range(6)),
    TokenAnalysis(6, 6, "assistant", PROMPT, "prompt"),
    TokenAnalysis(7, 7, "<think>", SKIPPED, "think tag"),
    extracted("The", 1, [("The", 0.85), ("A", 0.1)], -0.1625),
    extracted(" capital", None, [("[INST]", 0.5), ("\x1b[31mred", 0.25)], -12.0),
    extracted("東京都の塔です", 2, [("日本", 0.4), ("東京都の塔です", 0.3)]),
    extracted("مرحبا بالعالم", 1, [("مرحبا بالعالم", 0.6), ("👩🏽‍🚀", 0.2)]),
    extracted("🙂\n", 1, [("🙂\n", 0.9)]),
    extracted("\t\t", 1, [("\t\t", 0.9), ("\n\n    ", 0.05)]),
    extracted("\udcf0\udc9f", 2, [("\udce4\udcb8", 0.5), ("\udcf0\udc9f", 0.25)]),
    extracted("e\u0301\u0301", None, [("नमस्ते", 0.5), ("\u202egnorw", 0.25)], -3.0),
    TokenAnalysis(12, 12, "<|im_end|>", SKIPPED, "special token"),
]
EXTRACTED_ROWS = 8


def table(width: int | None = None, only=None, show_prompt=None, **options) -> list[str]:
    """The printed lines; a width makes it a terminal."""
    buffer = io.StringIO()
    terminal = {"width": width, "force_terminal": True, "legacy_windows": False} if width else {}
    analysis = Analysis(TOKENS, [], "dataset", "model", 0, 2, show_prompt, only)
    print_result(analysis, Console(file=buffer, highlight=False, **terminal, **options))
    return buffer.getvalue().splitlines()


def test_the_readmes_lines():
    lines = table()
    assert lines[0] == "Detailed Token Analysis: row 0 of dataset, model model"
    assert set(lines[1]) == {"="} and set(lines[3]) == {"-"} and len(lines[1]) >= 80
    assert [part.strip() for part in lines[2].split("|")] == [
        "Real Token",
        "Extracted Predictions (Top 2)",
        "Own p   Rank   Tail   Entropy",
    ]
    (line,) = [line for line in lines if line.startswith('"The"')]
    assert [part.strip() for part in line.split("|")] == [
        '"The"',
        '"The"(0.85)*, "A"(0.10)',
        "0.85      1   0.02      1.50",
    ]


def test_a_token_outside_the_nucleus_is_in_the_tail():
    (line,) = [line for line in table() if line.startswith('"␣capital"')]
    assert line.split("|")[-1].split() == ["6e-06", "tail", "0.02", "1.50"]
    assert "*" not in line


def test_only_the_prompts_end_is_shown():
    text = "\n".join(table())
    assert '"far2"' not in text and '"far3"' in text and '"assistant"' in text


def test_skipped_tokens_and_the_prompt_are_grey_in_a_terminal_and_say_why():
    lines = table(width=120)
    for token, why in (('"<think>"', "(skipped: think tag)"), ('"<|im_end|>"', "(skipped: special token)")):
        (line,) = [line for line in lines if token in line]
        assert why in line and line.startswith("\x1b[90m")
    assert any("(prompt)" in line and line.startswith("\x1b[90m") for line in lines)
    (line,) = [line for line in lines if '"The"' in line]
    assert '\x1b[1;32m"The"(0.85)*\x1b[0m' in line


@pytest.mark.parametrize("only", [None, 5])
@pytest.mark.parametrize("width", [None, 40, 59, 60, 68, 69, 80, 100, 109, 110, 143, 200])
def test_columns_line_up_by_cells_and_nothing_wraps(width, only):
    lines = table(width, only, color_system=None)
    rows = [line for line in lines if " | " in line]
    assert len(rows) >= 1 + (only or EXTRACTED_ROWS)
    columns = max(line.count(" | ") for line in rows)
    for column in range(columns):
        starts = {cell_len(" | ".join(line.split(" | ")[: column + 1])) for line in rows if line.count(" | ") > column}
        assert len(starts) == 1, (column, starts)
    if width:
        assert max(map(cell_len, lines)) <= width
    if (width or 0) >= 80:
        assert all('"The"' in line or len(line.split(" | ")[0].strip()) >= 4 for line in rows)


def test_wider_terminals_show_more():
    titles = {
        width: next(line for line in table(width, color_system=None) if "Real Token" in line) for width in (40, 80, 200)
    }
    assert "Own p" not in titles[40]
    assert "Rank" in titles[80] and "Entropy" not in titles[80]
    assert "Entropy" in titles[200]


@pytest.mark.parametrize(
    ("width", "title"), [(200, "(Top 3)"), (80, "(Top 1–2 of 3)"), (66, "Top 1–2 of 3"), (40, "Top 1–2 of 3")]
)
def test_the_heading_says_how_many_predictions_are_shown(width, title):
    """Of two tokens; the other one's second prediction has room beside its first one in no narrow place."""
    short, long = [("a", 0.5), ("b", 0.3), ("cccccccccccccccccccc", 0.1)], [("d" * 36, 0.5), ("e", 0.2), ("f", 0.1)]
    tokens = [extracted("x", 1, short), extracted("y", 1, long)]
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    print_result(Analysis(tokens, [], "dataset", "model", 0, 3), console)
    heading, first, second = [line.split(" | ")[1] for line in buffer.getvalue().splitlines() if " | " in line]
    assert title in heading and "…" not in heading
    assert [line.count(', "') + 1 for line in (first, second)] == ([3, 3] if width == 200 else [2, 1])


def test_a_pipe_gets_160_cells_or_as_many_as_columns_says(monkeypatch):
    long = [extracted("x", 1, [(f"{'long' * 10}{i}", 0.1) for i in range(5)])] * 3
    analysis = Analysis(long, [], "dataset", "model", 0, 5)

    def widest() -> int:
        buffer = io.StringIO()
        print_result(analysis, Console(file=buffer, highlight=False))
        return max(cell_len(line) for line in buffer.getvalue().splitlines() if "|" in line or "=" in line)

    monkeypatch.delenv("COLUMNS", raising=False)
    assert widest() <= 160
    monkeypatch.setenv("COLUMNS", "300")
    assert 280 < widest() <= 300
    monkeypatch.setenv("COLUMNS", "90")
    assert widest() <= 90


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (6, "#52"),
        (12, "#52"),
        (13, "#52 …start"),
        (17, "#52 …to the start"),
        (20, "#52 …to the start"),
        (14, "#52 …the start"),
        (40, "#52 …Leads to the start"),
    ],
)
def test_a_place_is_its_number_with_whole_words_or_alone(width, shown):
    assert where(52, "Leads to the start", width) == shown


def test_no_color_is_honoured(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = "\n".join(table(width=120))
    assert not re.search(r"\x1b\[[\d;]*(3[0-7]|9[0-7]|38)[;m]", text)
    assert "(skipped: think tag)" in text


def test_a_probability_that_underflows_is_nought():
    """−10³⁸ is what masks write; e to its power is no float32, nor any float64."""
    assert extracted("x", None, [], -3.4e38).probability == 0.0
    assert short_probability(0.0) == "0" and short_probability(5e-324) == "5e-324"


def test_the_totals_are_those_of_all_extracted_tokens():
    log_probs = [token.log_prob for token in TOKENS if token.status == EXTRACTED]
    perplexity = math.exp(-sum(log_probs) / len(log_probs))
    expected = (
        f"8 tokens · perplexity {perplexity:.2f} · top-1 agreement 50.0% · mean entropy 1.50 nats · "
        "98.0% of the probability stored"
    )
    assert table()[-1] == table(only=2)[-1] == expected
    assert " · ".join(table(width=60)[-2:]) == expected


def test_only_shows_the_most_surprising_first_with_what_stands_before_them():
    rows = [line for line in table(only=2) if '"(0.' in line]
    assert [line.split(" | ")[0].strip() for line in rows] == ['"␣capital"', '"◌\u0301\u0301"'.replace("◌", "e")]
    assert rows[0].split(" | ")[-1] == "#9 …stantThe" or rows[0].split(" | ")[-1].startswith("#9 …")


def test_the_prompt_is_shown_whole_or_not_at_all():
    assert sum("(prompt)" in line for line in table(show_prompt=True)) == 7
    assert sum("(prompt)" in line for line in table(show_prompt=False)) == 0


def test_nothing_acts_on_the_terminal_and_markup_is_text():
    text = "\n".join(table())
    assert "\x1b" not in text
    assert '"\\x1b[31mred"(0.25)' in text and '"[INST]"(0.50)' in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a", '"a"'),
        ("  x", '"␣␣x"'),
        ("\n\t\r", '"\\n\\t\\r"'),
        ('say "\\"', '"say␣\\"\\\\\\""'),
        ("\x00\x1b\x7f\x9b", '"\\x00\\x1b\\x7f\\x9b"'),
        ("a\u202eb\u200b", '"a\\u202eb\\u200b"'),
        ("\u00a0\u3000", '"\\xa0\\u3000"'),
        ("\udcf0\udc9f", '"\\xf0\\x9f"'),
        ("\u0301e", '"◌\u0301e"'),
        ("\U000e0041", '"\\U000e0041"'),
        ("", '""'),
    ],
)
def test_every_character_can_be_told(text, shown):
    assert quoted(text) == shown


def test_a_preview_shows_characters_whole_that_are_spread_over_tokens():
    """Each letter is two bytes, each byte a token of its own."""
    texts = ["س", *(byte.to_bytes(1).decode(errors="surrogateescape") for byte in "لام".encode())]
    buffer = io.StringIO()
    print_preview("x", [TokenAnalysis(i, i, text, EXTRACTED) for i, text in enumerate(texts)], Console(file=buffer))
    assert buffer.getvalue().splitlines()[1] == '  extracted     7  "سلام"'


def test_a_preview_tells_runs_of_tokens_apart():
    buffer = io.StringIO()
    print_preview("Source row 3", TOKENS, Console(file=buffer, highlight=False))
    assert buffer.getvalue().splitlines() == [
        "Source row 3: 17 tokens, 8 extracted",
        '  prompt        7  "far0far1far2far3far4far5assistant"',
        '  skipped       1  "<think>"  (think tag)',
        '  extracted     8  "The capital東京都の塔ですمرحبا بالعالم🙂\\n\\t\\t\\xf0\\x9fe\u0301\u0301"',
        '  skipped       1  "<|im_end|>"  (special token)',
    ]
    buffer = io.StringIO()
    print_preview("x", TOKENS, Console(file=buffer, highlight=False, force_terminal=True, width=60))
    styles = [line[: line.index("m") + 1] for line in buffer.getvalue().splitlines()[1:] if line.startswith("\x1b")]
    assert styles[:4] == ["\x1b[90m", "\x1b[90m", "\x1b[1;32m", "\x1b[90m"]
