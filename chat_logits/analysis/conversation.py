"""One stored conversation, analysed: what ``execute_analysis`` gives, in every form that it can be looked at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rich.console import Console

from chat_logits.analysis.tokens import PROMPT, TokenAnalysis, Totals, near_answers, total
from chat_logits.display.plain_json import json_text
from chat_logits.display.shown_result import ShownTokens
from chat_logits.display.token_page import conversation_page
from chat_logits.display.token_report import (
    default_console,
    print_chosen_tokens,
    print_parts,
    print_token_table,
    totals_parts,
)
from chat_logits.errors import UsageError

Choice = int | Callable[[TokenAnalysis], bool]
KEEP = object()  # as it is


@dataclass(frozen=True, repr=False)
class Analysis(ShownTokens, Sequence):
    """A conversation's tokens, all of them, in order; a sequence of ``TokenAnalysis``.

    ``messages`` are the conversation as it is stored, ``sample_index`` its row. What is shown follows from ``top_n``
    predictions a token, ``show_prompt`` (None: its end in a table, all of it elsewhere), and ``only``: the n most
    surprising tokens, or those extracted ones for which a function of a ``TokenAnalysis`` is true. Raises UsageError
    for numbers below 1.
    """

    tokens: list[TokenAnalysis]
    messages: list[dict]
    dataset_id: str
    model_id: str
    sample_index: int
    top_n: int = 5
    show_prompt: bool | None = None
    only: Choice | None = None

    def __post_init__(self):
        for name in ("top_n", "only"):
            number = getattr(self, name)
            if isinstance(number, int) and number < 1:
                raise UsageError(f"{name} {number}: expected 1 or more")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index):
        return self.tokens[index]

    def __repr__(self) -> str:
        return f"<Analysis of row {self.sample_index} of {self.dataset_id}: {len(self)} tokens>"

    def showing(self, only=KEEP, show_prompt=KEEP, top_n=KEEP) -> "Analysis":
        """The same analysis with another choice of what is shown; ``top_n`` may only become smaller."""
        given = {"only": only, "show_prompt": show_prompt, "top_n": top_n}
        chosen = replace(self, **{name: value for name, value in given.items() if value is not KEEP})
        if chosen.top_n > self.top_n:
            raise UsageError(f"top_n {top_n}: {self.top_n} predictions a token are at hand; analyse again for more")
        if chosen.top_n == self.top_n:
            return chosen
        return replace(chosen, tokens=[replace(t, predictions=t.predictions[: chosen.top_n]) for t in self.tokens])

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
        return sorted(extracted, key=lambda token: token.log_prob)[: self.only]

    def print(self, console: Console | None = None) -> None:
        """Print "Detailed Token Analysis:" and the totals. A terminal gets lines that fit it, a pipe whole ones."""
        console = console or default_console()
        if self.only is None:
            print_token_table(self._table, self.top_n, console)
        else:
            print_chosen_tokens(self.shown, self.tokens, self.top_n, console)
        print_parts(totals_parts(self.totals), console)

    @property
    def _table(self) -> list[TokenAnalysis]:
        if self.show_prompt is not None:
            return self.shown
        near = near_answers([token.status for token in self.tokens])
        return [token for token, is_near in zip(self.tokens, near, strict=True) if is_near]

    def to_dicts(self) -> list[dict]:
        """A dict a shown token; what is not known is None."""
        return [token.as_dict() for token in self.shown]

    def to_json(self) -> str:
        """What is shown, the totals, and which row of which dataset it is, as one JSON object."""
        content = {
            "logit_dataset_id": self.dataset_id,
            "sample_index": self.sample_index,
            "model_id": self.model_id,
            "totals": self.totals,
            "tokens": self.to_dicts(),
        }
        return json_text(content)

    def to_html(self) -> str:
        """The page: one file that needs nothing else."""
        return conversation_page(self)
