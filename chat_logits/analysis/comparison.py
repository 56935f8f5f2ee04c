"""One conversation in two logit datasets with the same tokenizer, token by token: how far apart their models are, and
where. dataset_comparison.py compares all conversations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from chat_logits.analysis.divergence import (
    ComparisonTotals,
    RowComparison,
    Source,
    TokenComparison,
    compare_rows,
    comparison_sums,
    totals_of,
)
from chat_logits.analysis.pairing import has_same_tokens, refuse_other_tokenizer, row_of, source_of, why_other_tokens
from chat_logits.analysis.runs import RunDifference, run_differences
from chat_logits.analysis.tokens import label_tokens, with_predictions
from chat_logits.data.alignment import Alignment
from chat_logits.data.row_alignment import RowAligner
from chat_logits.errors import ToolkitError
from chat_logits.storage.dataset import StoredDataset
from chat_logits.words import count_text


@dataclass(frozen=True, repr=False)
class Comparison(Sequence):
    """All tokens of a conversation, in order, as both models see them; a sequence of ``TokenComparison``.

    ``sample_index`` and ``other_sample_index`` are its rows, ``differences`` those between the runs. ``top_n``
    predictions are shown per token and model, and with ``only`` just the n extracted tokens with the largest KL, the
    largest first.
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
    differences: list[RunDifference] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index):
        return self.tokens[index]

    def __repr__(self) -> str:
        ids = (self.first.logit_dataset_id, self.other.logit_dataset_id)
        return f"<Comparison of row {self.sample_index} of {ids[0]} with {ids[1]}: {count_text(len(self), 'token')}>"

    def showing(self, only: int | None = None) -> "Comparison":
        """The same comparison with the ``only`` tokens furthest apart, or all of them."""
        return replace(self, only=only)

    @cached_property
    def shown(self) -> list[TokenComparison]:
        """The tokens that are shown."""
        if self.only is None:
            return self.tokens
        return sorted((token for token in self.tokens if token.is_extracted), key=lambda token: -(token.kl or 0.0))[
            : self.only
        ]

    def to_dicts(self) -> list[dict]:
        """A dict per shown token; numbers of tokens that were not extracted are None."""
        return [token.as_dict() for token in self.shown]

    @property
    def head(self) -> dict:
        """The datasets and rows, how their runs differ, and the totals."""
        names = ("first", "other", "sample_index", "other_sample_index", "source_index", "differences", "totals")
        return {name: getattr(self, name) for name in names}

    def as_dict(self) -> dict:
        """Plain values: the datasets and rows, how their runs differ, the totals, and the tokens shown."""
        return {**self.head, "tokens": self.to_dicts()}


def compare_analyses(
    first: StoredDataset,
    other: StoredDataset,
    tokenizer,
    sample_index: int = 0,
    chat_template: str | None = None,
    top_n: int = 5,
    only: int | None = None,
) -> Comparison:
    """Compare row ``sample_index`` of ``first`` (negative: from the end) with the other's row of the same source row.

    ``tokenizer`` is the recorded one; ``chat_template`` is as for ``align_row``, ``top_n`` and ``only`` as in
    ``Comparison``. Raises UsageError for datasets with different tokenizers, ToolkitError if the other does not have
    the conversation, or has it with other tokens.
    """
    row, other_index, other_row = _same_conversation(first, other, sample_index)
    sample_index %= first.num_rows
    alignment = RowAligner(tokenizer, first.manifest, chat_template).align(row, sample_index)
    compared = compare_rows(row, other_row, alignment.input_ids[alignment.positions])
    return Comparison(
        tokens=_compared_tokens(alignment, compared, tokenizer, top_n),
        totals=totals_of(comparison_sums(compared)),
        messages=row["messages"],
        first=source_of(first),
        other=source_of(other),
        sample_index=sample_index,
        other_sample_index=other_index,
        source_index=row["source_index"],
        differences=run_differences(first.manifest, other.manifest),
        top_n=top_n,
        only=only,
    )


def _same_conversation(first: StoredDataset, other: StoredDataset, sample_index: int) -> tuple[dict, int, dict]:
    """The row, and the other's index and row of the same source row with the same tokens."""
    refuse_other_tokenizer(first, other)
    row = first.read_row(sample_index)
    other_index, other_row = row_of(other, row["source_index"], sample_index % first.num_rows)
    if not has_same_tokens(row, other_row):
        raise ToolkitError(
            f"{other.dataset_id}: source row {row['source_index']} has other tokens there than in {first.dataset_id}; "
            f"{why_other_tokens(first, other)}"
        )
    return row, other_index, other_row


def _compared_tokens(alignment: Alignment, compared: RowComparison, tokenizer, top_n: int) -> list[TokenComparison]:
    labels = label_tokens(alignment, tokenizer)
    models = [with_predictions(labels, numbers, tokenizer, top_n) for numbers in (compared.first, compared.other)]
    tokens = [TokenComparison(*pair) for pair in zip(*models, strict=True)]
    columns = (compared.kl.tolist(), compared.agrees.tolist(), compared.log_prob_changes.tolist())
    for position, *numbers in zip(alignment.positions, *columns, strict=True):
        tokens[position] = TokenComparison(tokens[position].first, tokens[position].other, *numbers)
    return tokens
