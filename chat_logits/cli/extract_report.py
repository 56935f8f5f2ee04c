"""What the extract command prints: conversations before any model runs, and a finished run in numbers."""

from chat_logits.analysis.row import perplexity_of
from chat_logits.analysis.tokens import count_text, label_tokens
from chat_logits.display.text import visible
from chat_logits.display.token_tables import print_preview
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.run import Extraction
from chat_logits.extraction.run_description import open_run


def preview(config: ExtractConfig, count: int) -> None:
    """Print the first ``count`` conversations, each token with whether it is extracted. Writes nothing."""
    reader = open_run(config).reader
    ready, skipped = reader.align(0, count)
    for aligned in ready:
        tokens = label_tokens(aligned.alignment, reader.aligner.tokenizer)
        print_preview(f"Source row {aligned.source_index}", tokens)
    for entry in skipped:
        place = f" ({visible(entry['place'])})" if "place" in entry else ""
        print(f"Source row {entry['row']}{place} would be skipped: {visible(entry['reason'])}")


def print_extraction(done: Extraction) -> None:
    """The closing lines: what was written, what was skipped and why, how large and how likely it is."""
    print(f"Conversations  {done.conversations:,} written, {sum(done.skipped.values()):,} skipped")
    for reason, count in done.skipped.items():
        print(f"               {count:,} × {visible(reason)}")
    if done.turns_left_out:
        turns = count_text(done.turns_left_out, "turn")
        print(f"Left out       {turns} marked not to be trained on (weight, train, loss)")
    print(f"Tokens         {done.tokens:,} extracted")
    if done.mean_nll is not None:
        here = f"{done.bytes_in_folder:,} bytes in {done.folder}"
        where = here if done.bytes_in_folder else f"{done.num_bytes:,} bytes on the Hub"
        print(f"Disk           {done.num_bytes / done.tokens:.1f} bytes a token, {where}")
        print(f"Target tokens  mean NLL {done.mean_nll:.4f} nats, perplexity {perplexity_of(done.mean_nll):.2f}")
    if done.url:
        print(f"Pushed         {done.url}")
