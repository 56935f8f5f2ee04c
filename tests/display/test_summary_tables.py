"""The summary in terminals and pipes: lines that fit, bars as long as what they show, and texts that act on nothing."""

import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from chat_logits.analysis.summary import Histogram, summarize
from chat_logits.analysis.tokens import Prediction
from chat_logits.display.dataset_tables import kept_groups
from chat_logits.display.formats import short_nats
from chat_logits.display.results import shown
from chat_logits.display.tables import bar
from chat_logits.storage.dataset import open_dataset


@pytest.fixture(scope="module")
def summary(real_extraction, smollm2):
    return shown(replace(summarize(open_dataset(str(real_extraction)), smollm2[1]), dataset_id="outputs/demo"))


def printed(summary, width: int | None = None, **options) -> list[str]:
    """The lines; a width makes it a terminal."""
    buffer = io.StringIO()
    terminal = {"width": width, "force_terminal": True, "legacy_windows": False} if width else {}
    summary.print(Console(file=buffer, highlight=False, **terminal, **options))
    return buffer.getvalue().splitlines()


def table(lines: list[str], title: str) -> list[list[str]]:
    """The cells of the table under a title."""
    titled = next(i for i, line in enumerate(lines) if line.startswith(title))
    start = next(i for i, line in enumerate(lines) if i > titled and set(line) == {"="})
    rows = []
    for line in lines[start + 3 :]:
        if not line:
            break
        rows.append([cell.strip() for cell in line.split(" | ")])
    return rows


@pytest.fixture(scope="module")
def vast(summary):
    """A dataset of many and large numbers, with wide texts."""
    counts = [10**9 * count for count in summary.kept.counts]
    conversation = replace(summary.least_confident[0], sample_index=10**8, source_index=10**9, perplexity=135_405.0)
    loss = replace(
        summary.largest_losses[0], sample_index=10**8, text="東京都の塔です", before="🙂" * 40, log_prob=-3.4e38
    )
    vocabulary = replace(summary.vocabulary_losses[0], count=10**9, total_loss=1.5e10, text="東京都の塔です")
    return replace(
        summary,
        dataset_id="/a/long/path/that/no/narrow/terminal/has/room/for/and/few/wide/ones/have/much/room/for/outputs/demo",
        num_tokens=10**12,
        perplexity=1e9,
        num_bytes=10**15,
        entropy_is_bound=True,
        top5_is_bound=True,
        kept=replace(summary.kept, counts=counts),
        least_confident=[conversation, replace(conversation, perplexity=1e9)],
        largest_losses=[loss],
        vocabulary_losses=[vocabulary],
    )


@pytest.mark.parametrize("width", [40, 41, 60, 70, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal(summary, vast, width):
    for found in (summary, vast):
        lines = printed(found, width, color_system=None)
        assert max(map(cell_len, lines)) <= width
        assert max(map(cell_len, lines)) > 0.9 * width or width == 200


@pytest.mark.parametrize("width", [40, 60, 80])
def test_numbers_are_whole_where_they_are_shown(vast, width):
    """A narrow table has fewer columns, but no cut number: all that is cut is quoted, a place or a title."""
    lines = printed(vast, width, color_system=None)
    assert [row[-2] for row in table(lines, "Least confident")] == ["135,405.00", "1.0e+09"]
    text = "\n".join(lines)
    assert "perplexity 1.0e+09" in text and "0.068" not in text and f"{vast.calibration_error:.3f})" in text
    for line in lines[1:]:
        for cell in line.split(" | "):
            assert "…" not in cell or '"' in cell or "#" in cell or not any(map(str.isdigit, cell))


def test_a_narrow_terminal_has_fewer_columns(summary):
    """What is left at 40 cells: which token it was, which one was predicted, and how much each costs."""
    lines = printed(summary, 40, color_system=None)
    titles = [[title.strip() for title in line.split(" | ")] for line in lines if " | " in line]
    for expected in (
        ["Probability", "Tokens", "Mean p", "Right"],
        ["Nats", "Entropy", "Surprisal"],
        ["Entries", "Tokens", "Share"],
        ["Row", "Tokens", "Perplexity", "Question"],
        ["Row", "Token", "Log p", "Predicted f…"],
        ["Column", "Per token"],
    ):
        assert expected in titles


def test_a_pipe_gets_plain_text(summary):
    text = "\n".join(printed(summary))
    assert "\x1b" not in text and not any(line != line.rstrip() for line in text.split("\n"))
    assert [line.split("  ")[0] for line in text.split("\n")[:8]] == [
        "Summary of outputs/demo",
        "Model",
        "Conversations",
        "Tokens",
        "Target tokens",
        "",
        "Predictions",
        "Disk",
    ]


def test_titles_are_bold_in_a_terminal(summary):
    assert "\x1b[1mTokens with the largest loss\x1b[0m" in printed(summary, 80)


def test_every_table_has_the_summarys_numbers(summary):
    lines = printed(summary, 80, color_system=None)
    cells = [[*row[:1], *row[1].split(), *row[2:4]] for row in table(lines, "Calibration")]
    assert cells == [
        [f"{one.low:.1f} – {one.high:.1f}", f"{one.count}", f"{one.confidence:.3f}", f"{one.accuracy:.3f}"]
        for one in summary.calibration
    ]
    nats = table(lines, "Entropy of the predictions")
    assert [row[0] for row in nats[:2] + nats[-1:]] == ["0.0 – 0.5", "0.5 – 1.0", "10.0 –"]
    for column, counts in ((1, summary.entropies.counts), (2, summary.surprisals.counts)):
        assert [row[column].split()[0] for row in nats] == [f"{count / summary.num_tokens:.1%}" for count in counts]
    conversations = table(lines, "Least confident")
    assert [(int(row[0]), row[3]) for row in conversations] == [
        (one.sample_index, f"{one.perplexity:,.2f}") for one in summary.least_confident
    ]
    assert [row[4][:11] for row in conversations] == [f'"{one.question[:10]}' for one in summary.least_confident]
    losses = table(lines, "Tokens with the largest loss")
    assert [(int(row[0]), float(row[2]), row[4].split()[0]) for row in losses] == [
        (one.sample_index, round(one.log_prob, 2), f"#{one.position}") for one in summary.largest_losses
    ]
    vocabulary = table(lines, "Vocabulary tokens")
    assert [(int(row[0]), int(row[2])) for row in vocabulary] == [
        (one.token_id, one.count) for one in summary.vocabulary_losses
    ]
    sizes = table(lines, "Bytes by column")
    assert [(row[0], int(row[1].replace(",", ""))) for row in sizes] == [
        *((one.column, one.num_bytes) for one in summary.columns),
        ("all", summary.num_bytes),
    ]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1] * 65, ["0 1", "1 1", "2 1", "3 – 4 2", "5 – 8 4", "9 – 16 8", "17 – 32 16", "33 – 63 31", "64 1"]),
        ([0, 2, 3, 0, 0, 9], ["0 0", "1 2", "2 3", "3 – 4 0", "5 9"]),
        ([0, 0, 0, 7, 1], ["0 0", "1 0", "2 0", "3 7", "4 1"]),
        ([0, 5], ["0 0", "1 5"]),
    ],
)
def test_kept_entries_are_grouped_by_powers_of_two(summary, counts, expected):
    kept = Histogram(list(range(len(counts) + 1)), counts, is_open_ended=False)
    assert [f"{name} {count}" for name, count in kept_groups(kept)] == expected
    rows = table(printed(replace(summary, kept=kept)), "Nucleus entries kept")
    assert [f"{row[0]} {row[1]}" for row in rows] == expected


def test_lower_bounds_say_so(summary):
    text = "\n".join(printed(replace(summary, entropy_is_bound=False, top5_is_bound=False)))
    rates = (
        f"top-1 {summary.top1_rate:.1%}, top-5 {summary.top5_rate:.1%}, {summary.in_nucleus_rate:.1%} in the nucleus"
    )
    assert "≥" not in text and "at least" not in text and rates in text
    text = "\n".join(printed(replace(summary, entropy_is_bound=True, top5_is_bound=True)))
    assert f"mean entropy ≥ {summary.mean_entropy:.2f} nats" in text and "| Entropy ≥ " in text
    assert f"top-5 at least {summary.top5_rate:.1%}, " in text


def test_it_is_one_line_in_a_debugger_and_all_of_it_as_text(summary):
    counts = f"32 conversations, {summary.num_tokens:,} tokens"
    assert repr(summary) == f"<DatasetSummary of outputs/demo: {counts}, perplexity {summary.perplexity:.2f}>"
    assert str(summary).splitlines() == printed(summary)
    assert summary._repr_html_().startswith("<iframe")


def test_bars_are_as_long_as_their_share():
    assert [bar(share, 4) for share in (0, 1 / 32, 0.25, 0.5, 0.40625, 1)] == ["", "▏", "█", "██", "█▋", "████"]


def test_the_largest_bin_fills_its_column(summary):
    lines = printed(summary, 80, color_system=None)
    bars = [row[1].split()[1:] for row in table(lines, "Entropy of the predictions")]
    lengths = [len(one[0]) if one else 0 for one in bars]
    (largest,) = {
        length
        for length, n in zip(lengths, summary.entropies.counts, strict=True)
        if n == max(summary.entropies.counts)
    }
    for length, count in zip(lengths, summary.entropies.counts, strict=True):
        assert abs(length - largest * count / max(summary.entropies.counts)) <= 1


def test_texts_of_the_dataset_act_on_nothing(summary):
    nasty = "\x1b[31m[bold]東京🙂\u202e\n\udcf0 \u0301"
    prediction = Prediction(1, nasty, 0.5)
    loss = replace(summary.largest_losses[0], text=nasty, before=nasty * 9, prediction=prediction)
    lines = printed(
        replace(
            summary,
            model_id=nasty * 20,
            most_confident=[replace(summary.most_confident[0], question=nasty * 2)],
            largest_losses=[loss],
            vocabulary_losses=[replace(summary.vocabulary_losses[0], text=nasty)],
        ),
        80,
        color_system=None,
    )
    text = "\n".join(lines)
    assert "\x1b" not in text and "\u202e" not in text and "\udcf0" not in text
    assert max(map(cell_len, lines)) <= 80
    assert text.count("\\x1b[31m[bold]東京🙂") >= 2 and len(table(lines, "Tokens with the largest loss")) == 1
    where = table(lines, "Tokens with the largest loss")[0][-1]
    assert where.startswith(f"#{loss.position} …") and where.endswith("\\n\\xf0 \u0301")


def test_logarithms_stay_short():
    values = (-19.0053, -999.49, -999.6, -3.4e38, float("-inf"), 0.0)
    assert [short_nats(value) for value in values] == ["-19.01", "-999.49", "-1e+03", "-3e+38", "-inf", "0.00"]
    assert [short_nats(value, "+") for value in (0.31, -0.31)] == ["+0.31", "-0.31"]
