"""A logit dataset as one object that shows what it gives: tables, JSON and pages."""

from pathlib import Path
from typing import Any

from rich.console import Console

from chat_logits.analysis.logits import Logits, WrongKind
from chat_logits.display.results import shown
from chat_logits.storage.dataset import open_dataset


class ShownLogits(Logits):
    """A ``Logits`` whose results show themselves."""

    def print(self, console: Console | None = None) -> None:
        """Print the conversations with their numbers, the first ones of many."""
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
    where the recorded tokenizer lies now; with ``trust_remote_code`` it may run code of its own. Raises ToolkitError,
    with what to do about it.
    """
    if not isinstance(logit_dataset_id, str | Path):
        raise WrongKind(f'open_logits({logit_dataset_id!r:.40}): expected a folder or a Hub id, such as "user/logits"')
    return ShownLogits(open_dataset(str(logit_dataset_id), revision), chat_template, tokenizer_id, trust_remote_code)
