"""The notebook runs top to bottom on a dataset as `make demo` makes it, and shows true numbers."""

import json
import re

import nbclient
import nbformat
import numpy as np
from conftest import REPO

import logit_codec
from logit_dataset import open_dataset

NOTEBOOK = REPO / "notebooks" / "explore_logits.ipynb"


def test_no_outputs_are_stored():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)


def test_it_runs_and_its_numbers_are_the_datasets(real_extraction, monkeypatch):
    home = real_extraction.parent.parent / "notebooks"
    home.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(home)}}).execute()
    text = "\n".join(printed(cell) for cell in notebook.cells if cell.cell_type == "code")

    dataset = open_dataset(str(real_extraction))
    row = dataset.read_row(0)
    tokens = sum(dataset.read_row(i)["num_tokens"] for i in range(32))
    assert f"32 conversations, {tokens} tokens" in text
    assert row["messages"][0]["content"] in text
    assert "Detailed Token Analysis:" in text and text.count("(skipped: special token)") == 1
    position = logit_codec.dequantize_all_logits(row, 0)
    by_hand, decoded = (re.search(rf"ids {name}: +\[(.*)\]", text)[1].split() for name in ("by hand", "decoded"))
    assert by_hand == decoded == [str(i) for i in position.token_ids[:5]]
    shown = [float(number) for number in re.search(r"probabilities: +\[(.*)\]", text)[1].split()]
    np.testing.assert_allclose(shown, np.exp(position.log_probs[:5]), atol=5e-5)
    assert re.search(r"weights sum to: 1.0\b", text)


def printed(cell) -> str:
    """Everything a cell shows, as text."""
    outputs = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "\n".join(outputs)
