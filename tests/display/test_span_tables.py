"""Comparisons across tokenizers in terminals, pipes and as JSON: lines fit, and nothing in a text acts there."""

import json
import math
from dataclasses import replace

import pytest
from rich.cells import cell_len
from test_comparison_tables import FIRST, OTHER, printed, tables

from chat_logits.analysis.cross_records import (
    ConversationBits,
    CrossComparison,
    LeftOut,
    SpanComparison,
    SpanToken,
    Surprised,
    SurprisingSpan,
    TextSpan,
    bit_totals,
)
from chat_logits.display.results import shown
from chat_logits.display.span_tables import difference_text

EVIL = "\x1b[31mevil\x1b]0;title\x07\u202e"


def span(
    index: int, text: str, tokens: list[str], others: list[str], bits=None, other_bits=None, reason=None
) -> TextSpan:
    size = len(text.encode(errors="surrogateescape"))
    sides = [[SpanToken(i, i, each, -0.5) for i, each in enumerate(texts)] for texts in (tokens, others)]
    return TextSpan(index, 1, 10 * index, 10 * index + size, text, *sides, bits, other_bits, reason)


LEFT_OUT = [
    LeftOut("first: think tag; other: the template leaves it out", 0, 1234, 300, 0),
    LeftOut("outside of the answers' texts", 0, 0, 0, 12),
]
SPANS = [
    span(0, "<think>", ["<", "think", ">"], [], reason="first: think tag; other: the template leaves it out"),
    span(1, "The capital", ["The", " capital"], ["Th", "e", " cap", "ital"], 12.5, 3.25),
    span(2, "東京都", ["東京", "都"], ["東", "京", "都"], 1.0, 81.5),
    span(3, "\udcf0\udc9f", ["\udcf0\udc9f"], ["\udcf0", "\udc9f"], 0.0, math.inf),
    span(4, EVIL, [EVIL], [EVIL, "[bold]"], 1e12, 1e12),
]
TOTALS = bit_totals(4, 40, 6, 12, 13.5, 88.25)
CONVERSATION = shown(
    SpanComparison(SPANS, TOTALS, LEFT_OUT, [{"role": "user", "content": "Q"}], FIRST, OTHER, 3, 4, 4, True, 0, 1)
)


def surprising(text: str, bits: float, other_bits: float) -> SurprisingSpan:
    more = {"before": "dled by the City\n日本" + EVIL, "tokens": [text] * 3, "other_tokens": list(text)}
    return SurprisingSpan(
        12,
        11,
        12,
        1,
        210,
        len(text.encode()),
        text,
        bits=bits,
        other_bits=other_bits,
        difference=other_bits - bits,
        **more,
    )


def talk(row: int, bits: float, other_bits: float, question: str) -> ConversationBits:
    return ConversationBits(row, row, row, 50, 250, bits, other_bits, other_bits - bits, question)


DATASETS = shown(
    CrossComparison(
        first=FIRST,
        other=OTHER,
        totals=bit_totals(2458, 10888, 2620, 4868, 14290.5, 53787.25),
        error=0.0694,
        num_conversations=24,
        only_in_first=3,
        only_in_other=2,
        num_different=1,
        num_without_spans=4,
        num_other_system=5,
        rewrites=0,
        other_rewrites=7,
        left_out=LEFT_OUT,
        first_surprised=Surprised(1, 112, 496, 497.98),
        other_surprised=Surprised(23, 2346, 10392, 39994.9),
        first_spans=[surprising(" Zaragoza", 33.5, 10.7), surprising(EVIL, 3.4e38, 1.0)],
        other_spans=[surprising("建築許可", 4.5, 90.25)],
        conversations=[talk(i, 1.0 + i / 10, 2.0 - i / 20, "Can I appeal?\n" + "建築許可" * 20) for i in range(24)],
    )
)
VAST = replace(
    DATASETS,
    totals=bit_totals(10**9, 10**11, 10**10, 10**10, 3e38, math.inf),
    error=math.nan,
    conversations=[talk(10**8, 1.0, math.inf, "")],
    first_spans=[],
)
SHOWN = {"conversation": CONVERSATION, "chosen": CONVERSATION.showing(2), "datasets": DATASETS, "vast": VAST}


@pytest.mark.parametrize("width", [None, 40, 60, 70, 80, 110, 130, 200])
@pytest.mark.parametrize("name", SHOWN)
def test_columns_line_up_by_cells_and_no_line_is_too_long(name, width):
    lines = printed(SHOWN[name], width)
    assert len(tables(lines)) == {"datasets": 6, "vast": 5}.get(name, 2)
    for table in tables(lines):
        bars = [[cell_len(line[:i]) for i in range(len(line)) if line[i : i + 3] == " | "] for line in table]
        longest = max(bars, key=len)
        assert len(table) > 1 and all(at == longest[: len(at)] for at in bars)
    if width:
        assert max(map(cell_len, lines)) <= width
    assert not any(character in line for line in lines for character in "\x1b\x07\u202e")


def cells(line: str) -> list[str]:
    return [part.strip() for part in line.split(" | ")]


def test_a_line_a_span():
    lines = printed(CONVERSATION, 160)
    (line,) = [line for line in lines if line.startswith('"The')]
    expected = ['"The␣capital"', '"The" "␣capital"', '"Th" "e" "␣cap" "ital"', "11", "12.50", "3.25", "-9.25"]
    assert cells(line) == expected
    (line,) = [line for line in lines if line.startswith('"東')]
    assert cells(line)[3:] == ["9", "1.00", "81.50", "+80.50"]
    (line,) = [line for line in lines if line.startswith('"\\xf0')]
    assert cells(line)[3:] == ["2", "0.00", "inf", "+inf"]
    (line,) = [line for line in lines if line.startswith('"<think>"')]
    assert cells(line)[2].startswith("(left out; first: think tag") and cells(line)[3] == "7"
    assert "The two system messages differ." in lines
    assert "4 spans · 40 bytes · 6 and 12 tokens" in lines[-1] and "0.3375 and 2.2062 bits per byte" in lines[-1]


def test_what_is_compared_and_what_is_not_is_said():
    text = "\n".join(printed(DATASETS))
    for part in (
        *("24 conversations compared", "5 of them with another system message", "3 only in the first"),
        *("2 only in the other", "1 with other messages, left out", "4 with nothing to compare"),
        *("The other's tokens write 7 answers with other characters", "Conversations furthest apart, 20 of 24"),
        "Difference +3.6275 ± 0.0694 bits per byte, the other's minus the first's: the other model was more surprised.",
    ):
        assert part in text
    rows = [cells(line) for line in text.splitlines()]
    assert ["first", "1.3125", "14,290.5", "2,620", "4.16"] in rows and [
        "other",
        "4.9400",
        "53,787.2",
        "4,868",
        "2.24",
    ] in rows
    assert ["outside of the answers' texts", "0", "0", "0", "12"] in rows
    assert "more surprised" in difference_text(VAST) and "±" not in difference_text(VAST)
    same = replace(DATASETS, totals=bit_totals(1, 1, 1, 1, 2.0, 2.0))
    assert difference_text(same).endswith("neither model was more surprised.")


def test_json_has_all_of_it():
    told = json.loads(DATASETS.to_json())
    assert len(told["conversations"]) == 24 and told["totals"]["difference"] == pytest.approx(39496.75 / 10888)
    assert json.loads(VAST.to_json())["error"] is None and json.loads(VAST.to_json())["totals"]["other_bits"] is None
    told = json.loads(CONVERSATION.to_json())
    assert [each["difference"] for each in told["spans"]] == [None, -9.25, 80.5, None, 0.0]
    assert [each["num_bytes"] for each in told["spans"]][:3] == [7, 11, 9]
    frame = CONVERSATION.to_frame()
    assert frame["text"].tolist()[:3] == ["<think>", "The capital", "東京都"] and len(frame) == 5
