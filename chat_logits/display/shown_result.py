"""What a look at a dataset gives: it prints itself, and in a notebook shows itself as its page."""

import io

from rich.console import Console

from chat_logits.display.html_page import framed

TEXT_WIDTH = 160  # cells of what str() gives


class ShownResult:
    """Base of results that have ``print(console)`` and ``to_html()``."""

    def __str__(self) -> str:
        buffer = io.StringIO()
        self.print(Console(file=buffer, highlight=False, width=TEXT_WIDTH, force_terminal=False))
        return buffer.getvalue().rstrip("\n")

    def _repr_html_(self) -> str:
        return framed(self.to_html())


class ShownTokens(ShownResult):
    """Base of results that also have ``to_dicts()``, one dict a shown token."""

    def to_frame(self):
        """A pandas DataFrame, a row a shown token. Needs pandas."""
        import pandas

        return pandas.DataFrame(self.to_dicts())
