"""A logit dataset as one object with results that show themselves: tables, JSON and pages."""

from pathlib import Path
from typing import Any

from rich.console import Console

from chat_logits.analysis.logits import Logits
from chat_logits.analysis.opening import open_given
from chat_logits.display.results import shown


class ShownLogits(Logits):
    """A ``Logits`` whose results show themselves."""

    def print(self, console: Console | None = None) -> None:
        """Print the first conversations with their numbers."""
        self.listed().print(console)

    def _shown(self, result: Any) -> Any:
        return shown(result)


def open_logits(
    logit_dataset_id: str | Path,
    revision: str | None = None,
    chat_template: str | None = None,
    tokenizer_id: str | None = None,
    trust_remote_code: bool = False,
) -> ShownLogits:
    """A logit dataset, a folder or a Hub id (at ``revision``), as a sequence of its conversations (``Logits``).

    ``chat_template`` (a path or text) replaces the recorded one and must give the same tokens; ``tokenizer_id`` says
    where the recorded tokenizer is now; with ``trust_remote_code`` it may run its own code. Raises ToolkitError, which
    says what to do.
    """
    return ShownLogits(open_given(logit_dataset_id, revision), chat_template, tokenizer_id, trust_remote_code)
