"""One stored conversation, analysed token by token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from chat_logits.analysis.row import token_statistics
from chat_logits.analysis.tokens import (
    PROMPT,
    TokenAnalysis,
    Totals,
    label_tokens,
    near_answers,
    total,
    with_predictions,
)
from chat_logits.data.alignment import Alignment
from chat_logits.data.row_alignment import RowAligner, align_row
from chat_logits.errors import UsageError
from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.manifest import Manifest
from chat_logits.words import count_text

Selection = int | Callable[[TokenAnalysis], bool]
UNCHANGED = object()


@dataclass(frozen=True, repr=False)
class Analysis(Sequence):
    """All tokens of a conversation, in order; a sequence of ``TokenAnalysis``.

    ``messages`` are the conversation as it is stored, ``sample_index`` its row. These decide what is shown: ``top_n``
    predictions a token; ``show_prompt`` (None: its end in a table, all of it elsewhere); and ``only``: the n most
    surprising tokens, or the extracted tokens for which a function of a ``TokenAnalysis`` is true. Raises UsageError
    for numbers below 1.
    """

    tokens: list[TokenAnalysis]
    messages: list[dict]
    dataset_id: str
    model_id: str
    sample_index: int
    top_n: int = 5
    show_prompt: bool | None = None
    only: Selection | None = None

    def __post_init__(self):
        for name in ("top_n", "only"):
            number = getattr(self, name)
            if isinstance(number, int) and number < 1:
                raise UsageError(f"{name} {number}: expected 1 or more")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index):
        """A token, or, for a slice, the same analysis with these tokens."""
        found = self.tokens[index]
        return replace(self, tokens=found) if isinstance(index, slice) else found

    def __repr__(self) -> str:
        return f"<Analysis of row {self.sample_index} of {self.dataset_id}: {count_text(len(self), 'token')}>"

    def showing(self, only=UNCHANGED, show_prompt=UNCHANGED, top_n=UNCHANGED) -> "Analysis":
        """The same analysis with other tokens or predictions shown; ``top_n`` may only become smaller."""
        given = {"only": only, "show_prompt": show_prompt, "top_n": top_n}
        changed = replace(self, **{name: value for name, value in given.items() if value is not UNCHANGED})
        if changed.top_n > self.top_n:
            raise UsageError(f"top_n {top_n}: {self.top_n} predictions a token are at hand; analyse again for more")
        if changed.top_n == self.top_n:
            return changed
        return replace(changed, tokens=[replace(t, predictions=t.predictions[: changed.top_n]) for t in self.tokens])

    @cached_property
    def totals(self) -> Totals:
        """Tokens, perplexity, top-1 agreement, mean entropy and stored share, whatever is shown."""
        return total(self.tokens)

    @cached_property
    def shown(self) -> list[TokenAnalysis]:
        """The tokens that are shown, the n most surprising ones first."""
        if self.only is None:
            return [token for token in self.tokens if self.show_prompt is not False or token.status != PROMPT]
        extracted = [token for token in self.tokens if token.is_extracted]
        if callable(self.only):
            return [token for token in extracted if self.only(token)]
        return sorted(extracted, key=lambda token: token.log_prob or 0.0)[: self.only]

    @property
    def table(self) -> list[TokenAnalysis]:
        """The tokens of a table without ``only``: unless ``show_prompt`` says otherwise, the ends of prompts alone."""
        if self.show_prompt is not None:
            return self.shown
        near = near_answers([token.status for token in self.tokens])
        return [token for token, is_near in zip(self.tokens, near, strict=True) if is_near]

    def to_dicts(self) -> list[dict]:
        """A dict per shown token; numbers of tokens that were not extracted are None."""
        return [token.as_dict() for token in self.shown]

    @property
    def head(self) -> dict:
        """Which row of which dataset it is, and the totals."""
        return {
            "logit_dataset_id": self.dataset_id,
            "sample_index": self.sample_index,
            "model_id": self.model_id,
            "totals": self.totals,
        }

    def as_dict(self) -> dict:
        """Plain values: which row of which dataset it is, the totals, and the tokens that are shown."""
        return {**self.head, "tokens": self.to_dicts()}


def analyze_token_probabilities(
    row: dict, tokenizer, extraction: Manifest | Mapping, chat_template: str | None = None, top_n: int = 5
) -> list[TokenAnalysis]:
    """Every token of a stored row's conversation, the extracted ones with their predictions.

    ``extraction`` is a dataset's ``manifest``, or the content of its ``extraction.json``.

    ``align_row`` reconstructs and masks the tokens, and raises AlignmentError if they are not those extracted from; the
    remaining tokens match the stored distributions one to one.
    """
    return _analyzed(row, align_row(row, tokenizer, extraction, chat_template), tokenizer, top_n)


def _analyzed(row: dict, alignment: Alignment, tokenizer, top_n: int) -> list[TokenAnalysis]:
    numbers = token_statistics(row, alignment.input_ids[alignment.positions])
    return with_predictions(label_tokens(alignment, tokenizer), numbers, tokenizer, top_n)


def analyze_row(
    dataset: StoredDataset, row: dict, sample_index: int, aligner: RowAligner, tokenizer, top_n: int = 5, **shown
) -> Analysis:
    """The analysis of a stored row, number ``sample_index`` of its dataset.

    ``aligner`` is for the dataset and ``tokenizer``; ``shown`` are ``show_prompt`` and ``only`` of ``Analysis``.
    """
    return Analysis(
        tokens=_analyzed(row, aligner.align(row, sample_index), tokenizer, top_n),
        messages=row["messages"],
        dataset_id=dataset.dataset_id,
        model_id=dataset.manifest.model_id,
        sample_index=sample_index,
        top_n=top_n,
        **shown,
    )
