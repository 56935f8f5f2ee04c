"""One dataset's side of a comparison across tokenizers: its rows' answers, cut into pieces of bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chat_logits.analysis.spans import Piece, Tokenization
from chat_logits.data.places import Place, PlacedRow, Unit, place_row
from chat_logits.data.row_alignment import AlignmentError, RowAligner
from chat_logits.data.tokenizer import unknown_token_id
from chat_logits.storage.dataset import StoredDataset

EDGE_REASON = "a token goes beyond the answer"
UNKNOWN_REASON = "an unknown token"


@dataclass(frozen=True)
class SideRow:
    """A stored row of one dataset, with its tokens' places.

    ``log_probs`` float64 (T,) are those of all tokens, in nats, nan for tokens that were not extracted; ``reasons`` are
    the alignment's, plus one for extracted unknown tokens.
    """

    row: dict
    placed: PlacedRow
    log_probs: np.ndarray
    reasons: list[str | None]

    def answer(self, number: int) -> Tokenization | str:
        """The pieces of the answer with this number, or the reason why it cannot be compared."""
        place = self.placed.answers[number]
        if isinstance(place, str):
            return place
        low, high = place.start + place.shift, place.end + place.shift
        pieces = [self._piece(unit, place) for unit in self.placed.units if unit.start < high and unit.end > low]
        return Tokenization(pieces, place.start, place.end)

    def _piece(self, unit: Unit, place: Place) -> Piece:
        tokens = range(unit.first, unit.last + 1)
        log_probs = self.log_probs[unit.first : unit.last + 1]
        start, end = unit.start - place.shift, unit.end - place.shift
        reason = next((self.reasons[token] for token in tokens if self.reasons[token] is not None), None)
        if reason is None and not place.start <= start <= end <= place.end:
            reason = EDGE_REASON
        return Piece(
            start=max(start, place.start),
            end=min(end, place.end),
            tokens=tokens,
            nll=-float(np.nansum(log_probs)),
            reason=reason,
        )

    def is_extracted(self, token: int) -> bool:
        """Whether the token at this position was extracted."""
        return not np.isnan(self.log_probs[token])

    def tokens_of_turn(self, number: int) -> list[int]:
        """The positions of the tokens in an answer's turn; none if the turn is unknown."""
        if not self.placed.turns:
            return []
        start, end = self.placed.turns[number]
        units = (unit for unit in self.placed.units if unit.start < end and unit.end > start)
        return [token for unit in units for token in range(unit.first, unit.last + 1)]


class Side:
    """A dataset and its tokenizer; ``chat_template`` is as for ``align_row``."""

    def __init__(self, dataset: StoredDataset, tokenizer, chat_template: str | None = None):
        self.dataset, self.tokenizer = dataset, tokenizer
        self._aligner = RowAligner(tokenizer, dataset.manifest, chat_template)
        self._unknown_id = unknown_token_id(tokenizer)

    def place(self, rows: Sequence[dict], numbers: Sequence[int]) -> list[SideRow]:
        """The rows, of these ``numbers``, with their tokens' places. Raises AlignmentError as ``RowAligner.align``
        does, naming the dataset."""
        try:
            placed = list(self._aligner.placed(rows, numbers))
        except AlignmentError as error:
            raise AlignmentError(f"{self.dataset.dataset_id}: {error}") from error
        return [self._side_row(row, *rest) for row, rest in zip(rows, placed, strict=True)]

    def _side_row(self, row: dict, rendered, alignment, extents) -> SideRow:
        to_pieces = self.tokenizer.convert_ids_to_tokens
        log_probs = np.full(len(alignment.input_ids), np.nan)
        log_probs[alignment.positions] = row["token_log_probs"]
        reasons = [
            UNKNOWN_REASON if reason is None and token_id == self._unknown_id else reason
            for reason, token_id in zip(alignment.reasons, alignment.input_ids.tolist(), strict=True)
        ]
        return SideRow(row, place_row(row["messages"], rendered, alignment, extents, to_pieces), log_probs, reasons)

    def rewrites(self, row: SideRow, tokens: Sequence[int], text: str) -> bool:
        """Whether the tokens at these positions decode to a text other than this one, ignoring white space."""
        ids = row.placed.alignment.input_ids[list(tokens)].tolist()
        written = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return "".join(written.split()) != "".join(text.split())
