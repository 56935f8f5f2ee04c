"""Look at a logit dataset: every token of an answer beside what the model predicted in its place.

    python explore_logits.py --logit_dataset_id outputs/demo --sample_index 0

From Python: ``execute_analysis(logit_dataset_id=…, sample_index=0)``; ``unpack_indices`` and
``dequantize_all_logits`` decode a stored row by hand.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from chat_alignment import align_row, load_tokenizer, token_text, tokenizer_fingerprint
from command_line import leave, run_command
from errors import ToolkitError, UsageError
from hub_access import is_commit
from logit_codec import dequantize_all_logits, unpack_indices
from logit_dataset import open_dataset
from token_analysis import EXTRACTED, Prediction, TokenAnalysis, label_tokens
from token_report import print_token_table

__all__ = ["analyze_token_probabilities", "dequantize_all_logits", "execute_analysis", "unpack_indices"]


def execute_analysis(
    logit_dataset_id: str,
    sample_index: int = 0,
    chat_template: str | None = None,
    tokenizer_id: str | None = None,
    revision: str | None = None,
    top_n: int = 5,
    trust_remote_code: bool = False,
) -> list[TokenAnalysis]:
    """Print the token table of one stored row and return its tokens.

    ``logit_dataset_id`` is a folder or a Hub id (at ``revision``), ``sample_index`` counts stored rows, negative
    ones from the end. ``chat_template`` (a path or text) replaces the recorded one and must give the same tokens;
    ``tokenizer_id`` says where the recorded tokenizer lies now; with ``trust_remote_code`` it may run code of its own.
    Raises ToolkitError, with what to do about it.
    """
    if top_n < 1:
        raise UsageError(f"--top_n {top_n}: expected 1 or more")
    dataset = open_dataset(logit_dataset_id, revision)
    row = dataset.read_row(sample_index)
    tokenizer = _recorded_tokenizer(dataset.extraction, tokenizer_id, trust_remote_code)
    tokens = analyze_token_probabilities(row, tokenizer, dataset.extraction, chat_template, top_n)
    print_token_table(tokens, top_n)
    return tokens


def analyze_token_probabilities(
    row: dict, tokenizer, extraction: dict, chat_template: str | None = None, top_n: int = 5
) -> list[TokenAnalysis]:
    """Every token of a stored row's conversation, the extracted ones with their predictions.

    Reconstruction and masking are ``align_row``'s, which raises AlignmentError where the tokens are not those
    extracted from; the remaining tokens then match the stored distributions one to one.
    """
    tokens = label_tokens(align_row(row, tokenizer, extraction, chat_template), tokenizer)
    extracted = [token for token in tokens if token.status == EXTRACTED]
    told = (_with_predictions(token, row, i, tokenizer, top_n) for i, token in enumerate(extracted))
    return [next(told) if token.status == EXTRACTED else token for token in tokens]


def _with_predictions(token: TokenAnalysis, row: dict, index: int, tokenizer, top_n: int) -> TokenAnalysis:
    distribution = dequantize_all_logits(row, index)
    nucleus = distribution.token_ids[~distribution.is_sampled]
    found = np.flatnonzero(nucleus == token.token_id)
    return replace(
        token,
        log_prob=float(row["token_log_probs"][index]),
        rank=int(found[0]) + 1 if len(found) else None,
        kept=len(nucleus),
        tail_mass=distribution.tail_mass,
        predictions=[
            Prediction(int(i), token_text(tokenizer, int(i)), float(weight))
            for i, weight in zip(nucleus[:top_n], distribution.weights[:top_n], strict=False)
        ],
    )


def _recorded_tokenizer(extraction: dict, tokenizer_id: str | None, trust_remote_code: bool):
    """The tokenizer that the extraction used, from its recorded place or from ``tokenizer_id``."""
    source = tokenizer_id or extraction["model_id"]
    recorded, on_hub = tokenizer_id is None, is_commit(extraction["model_revision"])
    if recorded and not on_hub and not Path(source).exists():
        raise ToolkitError(
            f"the model was the local folder {source}, which is not here. Say where it lies now: --tokenizer_id FOLDER"
        )
    revision = extraction["model_revision"] if recorded and on_hub else None
    tokenizer = load_tokenizer(source, revision, extraction.get("gguf_file") if recorded else None, trust_remote_code)
    found = tokenizer_fingerprint(tokenizer)
    if found != extraction["tokenizer_fingerprint"]:
        raise ToolkitError(
            f"tokenizer of {source}: fingerprint {found[:12]}, expected {extraction['tokenizer_fingerprint'][:12]}; "
            "it is not the tokenizer that the extraction used. Name another with --tokenizer_id."
        )
    return tokenizer


# --- the command ---


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="explore_logits.py",
        allow_abbrev=False,
        description="Print each token of a stored answer beside what the model predicted in its place.",
    )
    add = parser.add_argument
    add(
        "--logit_dataset_id",
        required=True,
        metavar="ID",
        help="the logit dataset: a folder or a Hub id (required)",
    )
    add("--sample_index", type=int, default=0, metavar="N", help="stored row, negative from the end (default: 0)")
    add(
        "--chat_template",
        metavar="FILE_OR_TEXT",
        help="template to rebuild the tokens with; must give those extracted from (default: the recorded one)",
    )
    add(
        "--tokenizer_id",
        metavar="ID",
        help="folder or Hub id of the tokenizer, if the recorded model is not there (default: the recorded model)",
    )
    add("--revision", metavar="REV", help="branch, tag or commit of a Hub dataset (default: its main branch)")
    add("--top_n", type=int, default=5, metavar="N", help="predictions shown a token (default: 5)")
    add(
        "--trust_remote_code",
        action="store_true",
        help="run Python code that the tokenizer brings along, if it does (default: refuse)",
    )
    add("--debug", action="store_true", help="show the traceback of an error (default: its message)")
    return parser


def _explore(arguments: argparse.Namespace) -> None:
    options = {key: value for key, value in vars(arguments).items() if key != "debug"}
    execute_analysis(**options)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(_explore, build_parser().parse_args(argv), closed_pipe=0)


if __name__ == "__main__":
    leave(main())
