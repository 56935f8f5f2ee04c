"""Conversations as they would be extracted, before any model runs."""

from chat_logits.analysis.tokens import label_tokens
from chat_logits.display.token_tables import print_preview
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.run_description import open_run


def preview(config: ExtractConfig, count: int) -> None:
    """Print the first ``count`` conversations, each token with whether it is extracted. Writes nothing."""
    reader = open_run(config).reader
    ready, skipped = reader.align(0, count)
    for aligned in ready:
        tokens = label_tokens(aligned.alignment, reader.aligner.tokenizer)
        print_preview(f"Source row {aligned.source_index}", tokens)
    for entry in skipped:
        print(f"Source row {entry['row']} would be skipped: {entry['reason']}")
