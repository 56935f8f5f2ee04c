"""Stored rows to the tokens of the extraction, verified by each row's checksum."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

from chat_logits.data.alignment import AT_ONCE, Aligner, Alignment, RecordedAlignment, Rendered
from chat_logits.data.conversations import ConversationError
from chat_logits.data.stored_messages import from_stored
from chat_logits.data.template_choice import choose_template
from chat_logits.data.templates import TemplateError
from chat_logits.data.tools import from_stored_tools
from chat_logits.errors import ToolkitError


class AlignmentError(ToolkitError):
    """A stored row that does not match the rebuilt tokens; the message names the row."""


class RowAligner:
    """Aligns stored rows of one dataset.

    ``recorded`` is the dataset's manifest; ``chat_template`` (a path or text) replaces the recorded one.
    """

    def __init__(self, tokenizer, recorded: RecordedAlignment, chat_template: str | None = None):
        self._recorded = Aligner.from_recorded(tokenizer, recorded)
        self._aligner = self._recorded if chat_template is None else None
        self._chat_template = chat_template

    def align(self, row: dict, number: int | None = None) -> Alignment:
        """A row's input ids and extracted positions, verified by its checksum.

        ``number`` is the row's number in its dataset. Raises AlignmentError if the rebuilt tokens are not those of the
        extraction; it names the row by this number or, without one, by its source row.
        """
        return self.align_all([row], None if number is None else [number])[0]

    def align_all(self, rows: Sequence[dict], numbers: Sequence[int] | None = None) -> list[Alignment]:
        """The alignments of several rows, tokenized together. Raises as ``align`` for the row that is wrong."""
        return [alignment for _, alignment, _ in self.placed(rows, numbers)]

    def placed(
        self, rows: Sequence[dict], numbers: Sequence[int] | None = None
    ) -> Iterator[tuple[Rendered, Alignment, np.ndarray]]:
        """As ``align_all``, with each row's text, and the characters in it that its tokens stand for, int64 (T, 2)."""
        names = [*map(_source_row, rows)] if numbers is None else [f"row {number}: " for number in numbers]
        rendered = []
        for start in range(0, len(rows), AT_ONCE):
            rendered += self._render(rows[start : start + AT_ONCE], names[start : start + AT_ONCE])
        if self._aligner is None:
            return
        tokens = self._aligner.placed(rendered)
        for row, name, one, (alignment, extents) in zip(rows, names, rendered, tokens, strict=True):
            if alignment.checksum != row["alignment_checksum"] or len(alignment.positions) != row["num_tokens"]:
                with _naming(name):
                    raise AlignmentError(_explain_mismatch(row, alignment, self._recorded))
            yield one, alignment, extents

    def _render(self, rows: Sequence[dict], names: Sequence[str]) -> list[Rendered]:
        talks = [_talk(*pair) for pair in zip(rows, names, strict=True)]
        if self._aligner is None:
            self._aligner = self._choose(*talks[0])
        try:
            return self._render_together(talks)
        except (TemplateError, ConversationError) as error:
            if len(talks) == 1:
                raise AlignmentError(f"{names[0]}the conversation cannot be rebuilt: {error}") from error
        return [one for row, name in zip(rows, names, strict=True) for one in self._render([row], [name])]

    def _render_together(self, talks: list[tuple[list[dict], list[dict] | None]]) -> list[Rendered]:
        aligner = self._aligner
        assert aligner is not None
        rendered = aligner.template.render_all(talks)
        return [aligner.marked(talk, *one) for (talk, _), one in zip(talks, rendered, strict=True)]

    def _choose(self, conversation: list[dict], tools: list[dict] | None) -> Aligner:
        tokenizer, recorded = self._recorded.tokenizer, self._recorded.template
        choice = choose_template(
            self._chat_template, tokenizer, recorded.kwargs, recorded.date, [conversation], [tools]
        )
        known = self._recorded
        return Aligner(tokenizer, choice.template, known.skipped_ids, known.all_turns, known.keep_end_of_turn)


def align_row(
    row: dict, tokenizer, extraction: RecordedAlignment | Mapping, chat_template: str | None = None
) -> Alignment:
    """One stored row's tokens, as ``RowAligner`` aligns them; for many rows, that class is faster.

    ``extraction`` is a dataset's manifest, or the content of its ``extraction.json``.
    """
    if isinstance(extraction, Mapping):
        extraction = SimpleNamespace(**{"keep_end_of_turn": None, **extraction})
    return RowAligner(tokenizer, extraction, chat_template).align(row)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Raise a ToolkitError as AlignmentError, with the row's name in front."""
    try:
        yield
    except ToolkitError as error:
        raise AlignmentError(f"{name}{error}") from error


def _source_row(row: dict) -> str:
    """How a message about a row without a number begins; a row of which only some columns were read may lack its
    source row."""
    return f"source row {row['source_index']}: " if "source_index" in row else ""


def _talk(row: dict, name: str) -> tuple[list[dict], list[dict] | None]:
    """The messages and tools of a row."""
    with _naming(name):
        return from_stored(row["messages"]), from_stored_tools(row["tools"])


def _explain_mismatch(row: dict, rebuilt: Alignment, recorded: Aligner) -> str:
    """Where the rebuilt conversation first differs; known if the recorded template still gives the extracted tokens."""
    original = recorded.align(from_stored(row["messages"]), from_stored_tools(row["tools"]))
    if original.checksum != row["alignment_checksum"]:
        return (
            f"column alignment_checksum: the rebuilt conversation ({len(rebuilt.input_ids)} tokens) is not the "
            "one extracted. The messages, the template or the tokenizer have changed since."
        )
    if len(original.positions) != row["num_tokens"]:
        return f"column num_tokens: found {row['num_tokens']}, expected {len(original.positions)} extracted tokens"
    return "this chat template does not fit the extraction: " + _first_difference(original, rebuilt, recorded.tokenizer)


def _first_difference(original: Alignment, rebuilt: Alignment, tokenizer) -> str:
    for i, (token, expected) in enumerate(zip(rebuilt.input_ids, original.input_ids, strict=False)):
        if token != expected:
            texts = [repr(tokenizer.decode([int(token_id)])) for token_id in (token, expected)]
            return f"token {i} is {texts[0]} ({token}), expected {texts[1]} ({expected})"
    if len(rebuilt.input_ids) != len(original.input_ids):
        return f"it gives {len(rebuilt.input_ids)} tokens, expected {len(original.input_ids)}"
    for i, (reason, expected) in enumerate(zip(rebuilt.reasons, original.reasons, strict=True)):
        if (reason is None) != (expected is None):
            verb = ("extracts", "skipped") if reason is None else ("skips", "extracted")
            return f"it {verb[0]} token {i}, which was {verb[1]}"
    return "the extracted positions differ"
