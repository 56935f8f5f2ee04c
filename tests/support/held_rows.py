"""Rows of a logit dataset with chosen log-probabilities, held in memory, for comparisons of tokenizers."""

from collections.abc import Callable

import numpy as np

from chat_logits.data.alignment import Aligner
from chat_logits.data.row_alignment import RowAligner
from chat_logits.data.stored_messages import to_stored
from chat_logits.data.tokenizer import skipped_token_ids
from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.manifest import Manifest

SETTINGS: dict = {
    **{"top_k": 8, "top_p": 0.98, "num_sampled": 0, "seed": 0, "rows_per_shard": 8, "max_samples": None},
    **{"model_revision": "0" * 40, "gguf_file": None, "dataset_id": "chats", "dataset_config": None, "split": "train"},
    **{"dataset_revision": "0" * 40, "max_length": None, "columns": {}, "system_prompt": None, "tools_template": None},
    **{"template_kwargs": {}, "template_date": None, "dtype": "float32", "head_dtype": "float32"},
    **{"attn_implementation": None},
}


class HeldDataset:
    """What a comparison reads of a ``StoredDataset``.

    ``draw`` gives a row's target-token log-probabilities for their number; conversations of None are rows that the
    dataset has not got.
    """

    def __init__(
        self,
        name: str,
        tokenizer,
        template: str,
        conversations: list[list[dict] | None],
        draw: Callable[[int], np.ndarray],
        **recorded,
    ):
        self.dataset_id, self.tokenizer = name, tokenizer
        self.manifest = Manifest(
            **SETTINGS,
            model_id=f"model of {name}",
            tokenizer_fingerprint=f"tokenizer of {name}",
            chat_template=template,
            vocab_size=len(tokenizer),
            **{
                "skipped_token_ids": sorted(skipped_token_ids(tokenizer)),
                "all_turns": False,
                "keep_end_of_turn": False,
                **recorded,
            },
        )
        self._aligner = Aligner.from_recorded(tokenizer, self.manifest)
        self.rows_aligner = RowAligner(tokenizer, self.manifest)
        self.hold(conversations, draw)

    def hold(self, conversations: list[list[dict] | None], draw: Callable[[int], np.ndarray]) -> None:
        """Have these conversations' rows in the place of those before."""
        self.held = [
            self._row(i, talk, self._aligner.align(talk), draw)
            for i, talk in enumerate(conversations)
            if talk is not None
        ]
        self.num_rows = len(self.held)

    @staticmethod
    def _row(source_index: int, talk: list[dict], alignment, draw) -> dict:
        count = len(alignment.positions)
        return {
            "source_index": source_index,
            "messages": to_stored(talk),
            "tools": None,
            "num_tokens": count,
            "alignment_checksum": alignment.checksum,
            "token_log_probs": np.asarray(draw(count), np.float32),
        }

    count = StoredDataset.count

    def numbered_rows(self, rows=None):
        return enumerate(self.rows()) if rows is None else ((i, row) for i, row in enumerate(self.rows()) if i in rows)

    def rows(self):
        return iter(self.held)

    def read_row(self, index: int) -> dict:
        return self.held[index]

    def placed(self, index: int):
        """Text with spans, alignment and characters of the tokens of a row."""
        return next(iter(self.rows_aligner.placed([self.held[index]])))
