"""The closing lines of a run."""

from dataclasses import replace
from pathlib import Path

import pytest

from chat_logits.cli.extract_report import print_extraction
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.run import Extraction

CONFIG = ExtractConfig(model_id="m", dataset_id="d.jsonl", output_dir="out")
DONE = Extraction(CONFIG, Path("out"), None, 3, {}, 0, {}, 40, 4000, 4000, 2.0, 1.0, 0.5, 40)


@pytest.mark.parametrize(
    ("mean_nll", "told"),
    [
        (2.0, "mean NLL 2.0000 nats, perplexity 7.39"),
        (None, "mean NLL infinite: the model gives one of them no probability at all"),
    ],
)
def test_how_likely_the_answers_are_is_told_even_where_one_cannot_be(capsys, mean_nll, told):
    print_extraction(replace(DONE, mean_nll=mean_nll), CONFIG)
    lines = capsys.readouterr().out.splitlines()
    assert f"Target tokens  {told}" in lines and "Disk           100.0 bytes a token, 4,000 bytes in out" in lines
