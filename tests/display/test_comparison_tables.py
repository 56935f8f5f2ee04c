"""Comparisons in terminals and pipes: columns line up by cells, lines fit, nothing in a text acts on the terminal."""

import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from chat_logits.analysis.comparison import Comparison
from chat_logits.analysis.dataset_comparison import DatasetComparison
from chat_logits.analysis.divergence import (
    ComparisonTotals,
    DivergentConversation,
    DivergentToken,
    Source,
    TokenComparison,
)
from chat_logits.analysis.summary import Histogram
from chat_logits.analysis.tokens import EXTRACTED, PROMPT, SKIPPED, Prediction, TokenAnalysis
from chat_logits.display.results import shown

FIRST = Source("outputs/first", "HuggingFaceTB/SmolLM2-135M-Instruct")
OTHER = Source("/a/very/long/path/that/no/narrow/terminal/has/room/for/outputs/other", "evil\x1b[31m/model:smile:")
TOTALS = ComparisonTotals(1234, 0.15477, 0.7333, 38.587, 44.618, 0.5008)


def pair(position: int, text: str, *sides, kl=0.25, agrees=True, change=-0.31) -> TokenComparison:
    """Each side is the rank of the target token and the predictions."""
    told = []
    for rank, predictions in sides:
        found = [Prediction(i, text, p) for i, (text, p) in enumerate(predictions)]
        told.append(TokenAnalysis(position, 1, text, EXTRACTED, None, -0.5, rank, 31, 0.02, 0.7, found))
    return TokenComparison(*told, kl, agrees, change)


def unsaid(position: int, text: str, status: str, reason: str) -> TokenComparison:
    return TokenComparison(*[TokenAnalysis(position, 1, text, status, reason)] * 2)


TOKENS = [
    *(unsaid(i, f"far{i}", PROMPT, "prompt") for i in range(6)),
    unsaid(6, "<think>", SKIPPED, "think tag"),
    pair(7, "The", (1, [("The", 0.85), ("A", 0.1)]), (2, [("A", 0.6), ("The", 0.3)]), kl=1.5, agrees=False),
    pair(
        8, "東京都の塔です", (2, [("日本", 0.4), ("東京都の塔です", 0.3)]), (1, [("東京都の塔です", 0.5)]), change=0.51
    ),
    pair(9, "🙂\n", (1, [("🙂\n", 0.9), ("👩‍👩‍👧", 0.05)]), (1, [("🙂\n", 0.9)]), kl=30.5381, change=-200.0),
    pair(10, " capital", (None, [("[INST]", 0.5), ("\x1b[31mred", 0.25)]), (None, [("[INST]", 0.5)])),
    unsaid(11, "<|im_end|>", SKIPPED, "special token"),
]
MESSAGES = [{"role": "user", "content": "Q", "extra": None}]
CONVERSATION = shown(Comparison(TOKENS, TOTALS, MESSAGES, FIRST, OTHER, 3, 3, 3, top_n=2))


def apart(text: str, before: str, first: str, other: str) -> DivergentToken:
    return DivergentToken(
        12, 12, 3456, 3000, text, before, 10.25, -0.03, -123.4, *(Prediction(1, t, 0.56) for t in (first, other))
    )


COMPARED = DatasetComparison(
    first=FIRST,
    other=OTHER,
    totals=TOTALS,
    num_conversations=25,
    only_in_first=3,
    only_in_other=2,
    num_different=1,
    histogram=Histogram([0.0, 0.1, 1.0], [4000, 999, 1], is_open_ended=True),
    tokens=[
        apart(" building", "dled by the City Planning Administration.\n", " building", " construction"),
        apart(
            "東京都の塔です",
            "日本の首都はどこですか。日本の首都は東京です。",
            "日本日本日本日本日本",
            "🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂",
        ),
        apart("\x1b[2J", "\x1b]0;evil\x07", "[bold]", "\u202e"),
    ],
    conversations=[
        DivergentConversation(12, 12, 53, 0.289, 70.42, 1111.24, "Can I appeal?\n" + "建築許可" * 20),
        DivergentConversation(3, 3, 1, 2.5, 1.0, 12345.6, ""),
    ],
)
DATASETS = shown(COMPARED)
VAST = replace(
    DATASETS,
    totals=replace(TOTALS, num_tokens=10**9, perplexity=135_405.0, other_perplexity=1e9),
    tokens=[
        replace(DATASETS.tokens[1], log_prob=-3.4e38, other_log_prob=-1e4),
        replace(DATASETS.tokens[0], prediction=None),
    ],
    conversations=[DivergentConversation(10**8, 10**8, 10**5, 30.5381, 135_405.0, 1e9, "建築許可" * 20)],
)


def printed(found, width: int | None = None, color_system: str | None = None) -> list[str]:
    """The lines; a width makes it a terminal."""
    buffer = io.StringIO()
    terminal = {"width": width, "force_terminal": True, "legacy_windows": False} if width else {}
    found.print(Console(file=buffer, highlight=False, color_system=color_system, **terminal))
    return buffer.getvalue().splitlines()


def tables(lines: list[str]) -> list[list[str]]:
    """The lines of each table, its titles among them."""
    found = []
    for line in lines:
        if set(line) == {"="}:
            found.append([])
        elif " | " in line and found:
            found[-1].append(line)
    return found


SHOWN = {"conversation": CONVERSATION, "chosen": CONVERSATION.showing(3), "datasets": DATASETS, "vast datasets": VAST}


@pytest.mark.parametrize("width", [None, 40, 60, 70, 80, 110, 130, 200])
@pytest.mark.parametrize("name", SHOWN)
def test_columns_line_up_by_cells_and_no_line_is_too_long(name, width):
    lines = printed(SHOWN[name], width)
    assert len(tables(lines)) == (3 if "datasets" in name else 1)
    for table in tables(lines):
        bars = [[cell_len(line[:i]) for i in range(len(line)) if line[i : i + 3] == " | "] for line in table]
        longest = max(bars, key=len)
        assert len(table) > 1 and all(at == longest[: len(at)] for at in bars)
    if width:
        assert max(map(cell_len, lines)) <= width


def test_a_line_a_token_with_both_models_predictions():
    lines = printed(CONVERSATION, 80)
    assert lines[0] == "Detailed Token Comparison:"
    assert lines[1] == "First: row 3 of outputs/first, model HuggingFaceTB/SmolLM2-135M-Instruct"
    (the,) = [line for line in lines if line.startswith('"The"')]
    assert [part.strip() for part in the.split(" | ")] == ['"The"', '"The"(0.85)*', '"A"(0.60)', "≠  1.500    -0.31"]
    (smile,) = [line for line in lines if line.startswith('"🙂')]
    assert smile.endswith("   30.538  -200.00")
    titles = [part.strip() for part in tables(lines)[0][0].split(" | ")]
    assert titles == ["Target Token", "First (Top 1 of 2)", "Other (Top 1 of 2)", "KL  Δ log p"]
    assert not any('"far0"' in line or '"far1"' in line for line in lines) and any('"far5"' in line for line in lines)
    wide = printed(CONVERSATION, 200)
    assert any('"The"(0.85)*, "A"(0.10)' in line and '"A"(0.60), "The"(0.30)*' in line for line in wide)


def test_totals_are_below_the_table():
    whole = "1,234 tokens · mean KL ≥ 0.1548 nats · top-1 agreement 73.3% · perplexity 38.59 and 44.62"
    assert printed(CONVERSATION)[-1] == f"{whole} · mean |Δ log p| 0.501 nats"
    assert " · ".join(printed(CONVERSATION, 80)[-2:]) == f"{whole} · mean |Δ log p| 0.501 nats"


def test_skipped_tokens_are_grey_and_say_why_and_disagreement_is_yellow():
    lines = printed(CONVERSATION, 120, "standard")
    for token, why in (('"<think>"', "(skipped: think tag)"), ('"<|im_end|>"', "(skipped: special token)")):
        (line,) = [line for line in lines if token in line]
        assert line.startswith("\x1b[90m") and f"\x1b[90m{why}" in line and "≠" not in line
    assert any(line.startswith('\x1b[33m"The"') for line in lines)


def test_the_tokens_furthest_apart_say_where_they_stand():
    lines = printed(SHOWN["chosen"], 150)
    assert [line.split()[0] for line in tables(lines)[0][1:]] == ['"🙂\\n"', '"The"', '"東京都の塔です"']
    assert tables(lines)[0][2].rstrip().endswith("#7 …ar1far2far3far4far5<think>")


def test_a_dataset_comparisons_tables():
    lines = printed(DATASETS)
    assert lines[3] == (
        "25 conversations compared · 3 only in the first · 2 only in the other · 1 with other tokens, left out"
    )
    histogram, tokens, conversations = tables(lines)
    cells = [[part.strip() for part in line.split("|")] for line in histogram[1:]]
    assert cells == [
        ["0 to 0.1", "4,000", f"80.0% {'█' * 43}"],
        ["0.1 to 1", "999", f"20.0% {'█' * 10}▊"],  # 43 · 999/4000 = 10.74
        ["1 and more", "1", "0.0%"],
    ]
    cells = [part.strip() for part in tokens[1].split(" | ")]
    assert cells == [
        '"␣building"',
        '"␣building"(0.56)',
        '"␣constructio…(0.56)',
        "10.250    -0.03  -123.40",
        "row 12 #3456 …dled by the City Planning Administration.\\n",
    ]
    assert [part.strip() for part in conversations[1].split(" | ")][:5] == ["12", "0.289", "53", "70.42", "1,111.24"]


def test_large_numbers_are_whole():
    lines = printed(VAST)
    assert lines[-1].startswith("1,000,000,000 tokens · mean KL") and "perplexity 135,405.00 and 1.0e+09" in lines[-1]
    _, tokens, conversations = tables(lines)
    assert [part.strip() for part in conversations[1].split(" | ")][:5] == [
        "100000000",
        "30.538",
        "100,000",
        "135,405.00",
        "1.0e+09",
    ]
    assert [line.split(" | ")[3] for line in tokens[1:]] == [" 10.250   -3e+38   -1e+04", " 10.250    -0.03  -123.40"]


@pytest.mark.parametrize("width", [40, 60, 70, 80])
def test_perplexities_that_are_shown_are_not_cut(width):
    lines = printed(VAST, width)
    titles, cells = ([part.strip() for part in line.split(" | ")] for line in tables(lines)[-1])
    shown = {"Mean KL": "30.538", "Tokens": "100,000", "Perplexity": "135,405.00", "Other's": "1.0e+09"}
    assert [cells[titles.index(title)] for title in titles[1:-1]] == [shown[title] for title in titles[1:-1]]
    assert titles[1:-1] == list(shown) if width >= 70 else len(titles) >= 3
    assert any("perplexity 135,405.00 and 1.0e+09" in line for line in lines)


def test_one_is_not_many():
    one = replace(DATASETS, num_conversations=1, totals=replace(TOTALS, num_tokens=1))
    lines = printed(one)
    assert lines[3].startswith("1 conversation compared · ") and lines[-1].startswith("1 token · ")
    assert "1 conversation, 1 token, mean" in repr(one)


def test_each_is_one_line_in_a_debugger_and_all_of_it_as_text():
    assert repr(CONVERSATION) == f"<Comparison of row 3 of outputs/first with {OTHER.logit_dataset_id}: 12 tokens>"
    counts = "25 conversations, 1,234 tokens, mean KL ≥ 0.1548 nats"
    assert repr(DATASETS) == f"<DatasetComparison of outputs/first with {OTHER.logit_dataset_id}: {counts}>"
    for found in SHOWN.values():
        assert str(found).splitlines() == printed(found) and found._repr_html_().startswith("<iframe")


def test_what_is_shown_as_a_frame():
    frame = SHOWN["chosen"].to_frame()
    assert list(frame["text"]) == ["🙂\n", "The", "東京都の塔です"] and list(frame["kl"]) == [30.5381, 1.5, 0.25]
    assert frame["other"][1]["predictions"][0] == {"token_id": 0, "text": "A", "probability": 0.6}
    assert len(SHOWN["chosen"].showing().to_dicts()) == len(TOKENS) == len(CONVERSATION.to_frame())


def test_no_prediction_is_an_empty_cell():
    cells = [part.strip() for part in tables(printed(VAST))[1][2].split(" | ")]
    assert cells[:3] == ['"␣building"', "", '"␣constructio…(0.56)']
    narrow = [part.strip() for part in tables(printed(VAST, 40))[1][2].split(" | ")]
    assert narrow == ['"␣build…', "", '"␣const…', "10.250"]


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("width", [None, 80, 200])
def test_nothing_acts_on_the_terminal_and_markup_is_text(name, width):
    text = "\n".join(printed(SHOWN[name], width))
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    if width is None:
        assert "evil\\x1b[31m/model:smile:" in text
    if name == "datasets":
        assert '"[bold]"(0.56)' in text and '"\\x1b[2J"' in text and '"\\u202e"(0.56)' in text
