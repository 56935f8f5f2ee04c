"""Results that show themselves: any result of ``analysis`` as a terminal's tables, as JSON, or as a page.

``shown(result)`` is the same result with methods for that; ``explore_logits.execute_analysis`` and the like return it.
"""

import io
from collections.abc import Callable
from dataclasses import fields
from functools import singledispatch

from rich.console import Console

from chat_logits.analysis.budget import Budget
from chat_logits.analysis.comparison import Comparison
from chat_logits.analysis.conversation import Analysis
from chat_logits.analysis.cross_records import CrossComparison, SpanComparison
from chat_logits.analysis.dataset_comparison import DatasetComparison
from chat_logits.analysis.filtering import Filtering
from chat_logits.analysis.summary import DatasetSummary
from chat_logits.analysis.thinning import Thinning
from chat_logits.analysis.verification import Verification
from chat_logits.display.budget_tables import print_budget, print_thinning
from chat_logits.display.comparison_page import comparison_page
from chat_logits.display.dataset_page import datasets_page, summary_page
from chat_logits.display.dataset_tables import print_datasets, print_summary, print_verification
from chat_logits.display.filter_tables import print_filtering
from chat_logits.display.page import framed
from chat_logits.display.span_page import bits_page, spans_page
from chat_logits.display.span_tables import print_bits, print_spans
from chat_logits.display.student_page import student_page
from chat_logits.display.student_tables import print_student
from chat_logits.display.tables import default_console
from chat_logits.display.text import json_text, whole_texts
from chat_logits.display.token_page import analysis_page
from chat_logits.display.token_tables import print_analysis, print_comparison
from chat_logits.training.student_report import StudentReport

TEXT_WIDTH = 160  # cells of str()


@singledispatch
def print_result(result, console: Console) -> None:  # noqa: ARG001
    """Print a result of ``analysis``. Lines fit the terminal; a pipe gets ``PIPE_WIDTH`` cells."""
    raise TypeError(f"{type(result).__name__} is not a result of an analysis")


@singledispatch
def page_of(result, frame: dict | None = None) -> str:  # noqa: ARG001
    """A result of ``analysis`` as a page: one file that needs nothing else. A ``Verification``, a ``Budget``, a
    ``Thinning`` and a ``Filtering`` have none."""
    raise TypeError(f"{type(result).__name__} has no page")


print_result.register(Analysis, print_analysis)
print_result.register(Comparison, print_comparison)
print_result.register(DatasetComparison, print_datasets)
print_result.register(SpanComparison, print_spans)
print_result.register(CrossComparison, print_bits)
print_result.register(DatasetSummary, print_summary)
print_result.register(Budget, print_budget)
print_result.register(Filtering, print_filtering)
print_result.register(StudentReport, print_student)
print_result.register(Thinning, print_thinning)
print_result.register(Verification, print_verification)
page_of.register(Analysis, analysis_page)
page_of.register(Comparison, comparison_page)
page_of.register(DatasetComparison, datasets_page)
page_of.register(SpanComparison, spans_page)
page_of.register(CrossComparison, bits_page)
page_of.register(DatasetSummary, summary_page)
page_of.register(StudentReport, student_page)


class Shown:
    """A result that can print itself, and convert itself to text and to JSON."""

    as_dict: Callable[[], dict]

    def print(self, console: Console | None = None) -> None:
        """Print it, to standard output unless a ``console`` is given."""
        print_result(self, console or default_console())

    def __str__(self) -> str:
        buffer = io.StringIO()
        self.print(Console(file=buffer, highlight=False, width=TEXT_WIDTH, force_terminal=False))
        return buffer.getvalue().rstrip("\n")

    def to_json(self) -> str:
        """The result as one JSON object; infinite numbers are null."""
        return json_text(self.as_dict())


class ShownPage(Shown):
    """A result that also has a page, which a notebook shows."""

    def to_html(self, frame: dict | None = None) -> str:
        """The page: one file that needs nothing else. ``frame`` is as in ``token_page``, if it is one of several."""
        return page_of(self, frame)

    def _repr_html_(self) -> str:
        return framed(self.to_html())


class ShownTokens(ShownPage):
    """A result that is also a list of tokens, or of spans of them."""

    to_dicts: Callable[[], list[dict]]

    def to_frame(self):
        """A pandas DataFrame with a row per shown entry. It can be written as JSON and Parquet: bytes of partial
        characters are U+FFFD in its texts. Needs pandas."""
        import pandas

        return pandas.DataFrame(whole_texts(self.to_dicts()))


class ShownAnalysis(ShownTokens, Analysis):
    """An ``Analysis`` that shows itself."""


class ShownComparison(ShownTokens, Comparison):
    """A ``Comparison`` that shows itself."""


class ShownDatasetComparison(ShownPage, DatasetComparison):
    """A ``DatasetComparison`` that shows itself."""


class ShownSpanComparison(ShownTokens, SpanComparison):
    """A ``SpanComparison`` that shows itself."""


class ShownCrossComparison(ShownPage, CrossComparison):
    """A ``CrossComparison`` that shows itself."""


class ShownSummary(ShownPage, DatasetSummary):
    """A ``DatasetSummary`` that shows itself."""


class ShownStudent(ShownPage, StudentReport):
    """A ``StudentReport`` that shows itself."""


class ShownVerification(Shown, Verification):
    """A ``Verification`` that shows itself."""


class ShownBudget(Shown, Budget):
    """A ``Budget`` that shows itself."""


class ShownThinning(Shown, Thinning):
    """A ``Thinning`` that shows itself."""


class ShownFiltering(Shown, Filtering):
    """A ``Filtering`` that shows itself."""


KINDS = (
    ShownAnalysis,
    ShownComparison,
    ShownDatasetComparison,
    ShownSummary,
    ShownVerification,
    ShownSpanComparison,
    ShownCrossComparison,
    ShownBudget,
    ShownThinning,
    ShownStudent,
    ShownFiltering,
)


def shown(result):
    """A result of ``analysis`` as one that shows itself."""
    kind = next(kind for kind in KINDS if issubclass(kind, type(result)))
    return kind(**{field.name: getattr(result, field.name) for field in fields(result)})
