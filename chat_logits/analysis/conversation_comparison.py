"""One conversation in two logit datasets, two checkpoints say, token by token side by side."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rich.console import Console

from chat_logits.analysis.divergence import (
    ComparisonTotals,
    RowComparison,
    Source,
    TokenComparison,
    compare_rows,
    comparison_sums,
    totals_of,
)
from chat_logits.analysis.tokens import label_tokens, with_predictions
from chat_logits.data.alignment import Alignment, align_row
from chat_logits.display.comparison_page import comparison_page
from chat_logits.display.comparison_report import print_conversation
from chat_logits.display.plain_json import json_text
from chat_logits.display.shown_result import ShownTokens
from chat_logits.display.token_report import count_text, default_console
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.dataset import StoredDataset


@dataclass(frozen=True, repr=False)
class Comparison(ShownTokens, Sequence):
    """A conversation's tokens, all of them, in order, as both models see them; a sequence of ``TokenComparison``.

    ``sample_index`` and ``other_sample_index`` are its rows. ``top_n`` predictions a token and model are shown, and
    with ``only`` the n extracted tokens with the largest KL alone, the largest first.
    """

    tokens: list[TokenComparison]
    totals: ComparisonTotals
    messages: list[dict]
    first: Source
    other: Source
    sample_index: int
    other_sample_index: int
    source_index: int
    top_n: int = 5
    only: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index):
        return self.tokens[index]

    def __repr__(self) -> str:
        ids = (self.first.logit_dataset_id, self.other.logit_dataset_id)
        return f"<Comparison of row {self.sample_index} of {ids[0]} with {ids[1]}: {count_text(len(self), 'token')}>"

    def showing(self, only: int | None = None) -> "Comparison":
        """The same comparison with another choice of what is shown."""
        return replace(self, only=only)

    @cached_property
    def shown(self) -> list[TokenComparison]:
        """The tokens that are shown."""
        if self.only is None:
            return self.tokens
        return sorted((token for token in self.tokens if token.is_extracted), key=lambda token: -token.kl)[: self.only]

    def print(self, console: Console | None = None) -> None:
        """Print a line a token and the totals. A terminal gets lines that fit it, a pipe whole ones."""
        print_conversation(self, console or default_console())

    def to_dicts(self) -> list[dict]:
        """A dict a shown token; what is not known is None."""
        return [token.as_dict() for token in self.shown]

    def to_json(self) -> str:
        """What is shown, the totals, and which rows of which datasets it is, as one JSON object."""
        names = ("first", "other", "sample_index", "other_sample_index", "source_index", "totals")
        content = {name: getattr(self, name) for name in names}
        return json_text({**content, "tokens": self.to_dicts()})

    def to_html(self) -> str:
        """The page: one file that needs nothing else."""
        return comparison_page(self)


def compare_analyses(
    first: StoredDataset,
    other: StoredDataset,
    tokenizer,
    sample_index: int = 0,
    chat_template: str | None = None,
    top_n: int = 5,
    only: int | None = None,
) -> Comparison:
    """Row ``sample_index`` of ``first`` (negative ones from the end) beside the other's row of the same source row.

    ``tokenizer`` is the recorded one; ``chat_template`` is as for ``align_row``, ``top_n`` and ``only`` as in
    ``Comparison``. Raises UsageError for datasets of two tokenizers, ToolkitError where the other has not got the
    conversation, or has it with other tokens.
    """
    refuse_other_tokenizer(first, other)
    row = first.read_row(sample_index)
    other_index, other_row = _row_of(other, row["source_index"], sample_index % first.num_rows)
    if not has_same_tokens(row, other_row):
        raise ToolkitError(
            f"{other.dataset_id}: source row {row['source_index']} has other tokens there than in {first.dataset_id}; "
            "expected the same conversation, template and skipped tokens"
        )
    alignment = align_row(row, tokenizer, first.manifest, chat_template)
    compared = compare_rows(row, other_row, alignment.input_ids[alignment.positions])
    return Comparison(
        tokens=_compared_tokens(alignment, compared, tokenizer, top_n),
        totals=totals_of(comparison_sums(compared)),
        messages=row["messages"],
        first=source_of(first),
        other=source_of(other),
        sample_index=sample_index % first.num_rows,
        other_sample_index=other_index,
        source_index=row["source_index"],
        top_n=top_n,
        only=only,
    )


def refuse_other_tokenizer(first: StoredDataset, other: StoredDataset) -> None:
    """Raise UsageError where two datasets' ids are not of one tokenizer."""
    expected, found = (dataset.manifest.tokenizer_fingerprint for dataset in (first, other))
    if found != expected:
        raise UsageError(
            f"{other.dataset_id}: made with another tokenizer ({found[:12]}) than {first.dataset_id} "
            f"({expected[:12]}). Compare datasets whose models share a tokenizer."
        )


def _row_of(dataset: StoredDataset, source_index: int, likely: int) -> tuple[int, dict]:
    """The stored row of a source row and its number, which is ``likely`` unless the datasets lack different rows.

    Rows are in the order of their source rows.
    """
    row = dataset.read_row(likely) if likely < dataset.num_rows else None
    if row is not None and row["source_index"] == source_index:
        return likely, row
    numbers = range(dataset.num_rows)
    found = bisect.bisect_left(numbers, source_index, key=lambda i: dataset.read_row(i)["source_index"])
    row = dataset.read_row(found) if found < dataset.num_rows else None
    if row is None or row["source_index"] != source_index:
        raise ToolkitError(
            f"{dataset.dataset_id}: source row {source_index} is not in it (skipped, or not reached); "
            "choose another conversation with --sample_index"
        )
    return found, row


def has_same_tokens(row: dict, other_row: dict) -> bool:
    """Whether two rows are about the same input ids and the same extracted tokens, by their checksums."""
    return all(row[name] == other_row[name] for name in ("alignment_checksum", "num_tokens"))


def source_of(dataset: StoredDataset) -> Source:
    """The dataset and the model that it is of."""
    return Source(dataset.dataset_id, dataset.manifest.model_id)


def _compared_tokens(alignment: Alignment, compared: RowComparison, tokenizer, top_n: int) -> list[TokenComparison]:
    labels = label_tokens(alignment, tokenizer)
    sides = [with_predictions(labels, numbers, tokenizer, top_n) for numbers in (compared.first, compared.other)]
    tokens = [TokenComparison(*pair) for pair in zip(*sides, strict=True)]
    numbers = (compared.kl.tolist(), compared.agrees.tolist(), compared.log_prob_changes.tolist())
    for position, *apart in zip(alignment.positions, *numbers, strict=True):
        tokens[position] = TokenComparison(tokens[position].first, tokens[position].other, *apart)
    return tokens
