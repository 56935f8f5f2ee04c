"""The size and error of smaller settings, and the size of a thinned dataset, in the terminal."""

from rich.console import Console

from chat_logits.analysis.budget import Budget, BudgetLine
from chat_logits.analysis.thinning import Thinning
from chat_logits.display.tables import Column, Table, numbers, print_line, print_parts, print_table
from chat_logits.display.text import line_of
from chat_logits.words import count_text

DEVIATING = (
    "Deviation: root mean square of the target's error from the draws, relative to the target's norm; added by "
    "thinning, and in all. It averages out over tokens."
)
BIASED = "Bias: the error of the renormalised nucleus, relative to the same norm. It does not average out."


def print_budget(budget: Budget, console: Console) -> None:
    """Print the stored setting and those that no other one beats, and the error of the nucleus alone."""
    print_line(f"Budget of {line_of(budget.dataset_id)}", console, "bold")
    rows, tokens = count_text(budget.num_conversations, "conversation"), count_text(budget.num_tokens, "token")
    print_parts([f"{rows}, {tokens}", f"{count_text(len(budget.lines), 'setting')} written"], console)
    drawn = [line for line in budget.lines if line.num_sampled]
    if drawn:
        best = [drawn[0], *sorted((line for line in drawn[1:] if line.is_best), key=lambda one: -one.bytes_per_token)]
        print_line(f"With draws, as stored and where none of the {len(drawn)} takes less and deviates less:", console)
        print_table(Table("With draws", [*_settings(best), *_deviations(best)], ("In nucleus", "Added")), console)
        print_line(DEVIATING, console)
    alone = [line for line in budget.lines if not line.num_sampled]
    print_line("Without draws:", console)
    spare = ("In nucleus", "KL to the model", "S")  # S is 0
    print_table(Table("Without draws", [*_settings(alone), *_biases(alone)], spare), console)
    print_line(BIASED, console)


def _settings(lines: list[BudgetLine]) -> list[Column]:
    return [
        numbers("K", [f"{line.top_k}" for line in lines]),
        numbers("S", [f"{line.num_sampled}" for line in lines]),
        numbers("P", [f"{line.top_p:g}" for line in lines]),
        numbers("Bytes/token", [f"{line.bytes_per_token:.1f}" for line in lines]),
        numbers("In nucleus", [f"{line.stored:.1%}" for line in lines]),
    ]


def _deviations(lines: list[BudgetLine]) -> list[Column]:
    return [
        numbers("Added", [_share(line.deviation) for line in lines]),
        numbers("In all", [_share(line.whole_deviation) for line in lines]),
    ]


def _biases(lines: list[BudgetLine]) -> list[Column]:
    return [
        numbers("Bias", [f"{'≥ ' * line.bias_is_bound}{_share(line.bias)}" for line in lines]),
        numbers("KL to the model", [f"{line.nucleus_kl:.4f}" for line in lines]),
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def print_thinning(thinning: Thinning, console: Console) -> None:
    """Print where a thinned dataset is, and its size compared with the original's."""
    rows, tokens = count_text(thinning.num_conversations, "conversation"), count_text(thinning.num_tokens, "token")
    print_line(f"Thinned {line_of(thinning.dataset_id)} to {line_of(thinning.folder)}", console, "bold")
    setting = f"K = {thinning.top_k}, S = {thinning.num_sampled}, P = {thinning.top_p:g}"
    before, after = (size / thinning.num_tokens for size in (thinning.num_bytes_before, thinning.num_bytes))
    size = f"{after:.1f} bytes per token where there were {before:.1f}"
    print_parts([setting, f"{rows}, {tokens}", size, f"{thinning.num_bytes:,} bytes"], console)
