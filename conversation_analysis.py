"""One stored conversation, analysed: what ``execute_analysis`` gives, in every form that it can be looked at."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rich.console import Console

from html_page import framed
from plain_json import json_text
from token_analysis import PROMPT, TokenAnalysis, Totals, total
from token_page import conversation_page
from token_report import default_console, print_chosen_tokens, print_parts, print_token_table, totals_parts

PROMPT_END = 4  # prompt tokens that the table shows before each answer

Choice = int | Callable[[TokenAnalysis], bool]


@dataclass(frozen=True)
class Analysis(Sequence):
    """A conversation's tokens, all of them, in order; a sequence of ``TokenAnalysis``.

    ``messages`` are the conversation as it is stored, ``sample_index`` its row. What is shown follows from ``top_n``
    predictions a token, ``show_prompt`` (None: its end in a table, all of it elsewhere), and ``only``: the n most
    surprising tokens, or those extracted ones for which a function of a ``TokenAnalysis`` is true.
    """

    tokens: list[TokenAnalysis]
    messages: list[dict]
    dataset_id: str
    model_id: str
    sample_index: int
    top_n: int = 5
    show_prompt: bool | None = None
    only: Choice | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index):
        return self.tokens[index]

    def showing(self, only: Choice | None = None, show_prompt: bool | None = None) -> "Analysis":
        """The same analysis with another choice of what is shown."""
        return replace(self, only=only, show_prompt=show_prompt)

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
            shown = [token for i, token in enumerate(self.tokens) if self._is_in_table(i)]
            print_token_table(shown, self.top_n, console)
        else:
            print_chosen_tokens(self.shown, self.tokens, self.top_n, console)
        print_parts(totals_parts(self.totals), console)

    def _is_in_table(self, i: int) -> bool:
        if self.show_prompt or self.tokens[i].status != PROMPT:
            return True
        ahead = self.tokens[i : i + PROMPT_END + 1]
        return self.show_prompt is None and any(token.status != PROMPT for token in ahead)

    def __str__(self) -> str:
        buffer = io.StringIO()
        self.print(Console(file=buffer, highlight=False, width=200, force_terminal=False))
        return buffer.getvalue().rstrip("\n")

    def __repr__(self) -> str:
        return f"<Analysis of row {self.sample_index} of {self.dataset_id}: {len(self)} tokens>"

    def to_dicts(self) -> list[dict]:
        """A dict a shown token; what is not known is None."""
        return [token.as_dict() for token in self.shown]

    def to_frame(self):
        """A pandas DataFrame, a row a shown token. Needs pandas."""
        import pandas

        return pandas.DataFrame(self.to_dicts())

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

    def _repr_html_(self) -> str:
        return framed(self.to_html())
