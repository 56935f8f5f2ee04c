"""The notebook runs top to bottom on a dataset as `make demo` makes it, and shows true numbers."""

import json
import math
import re
import shutil

import nbclient
import nbformat
import numpy as np
import pytest
from conftest import MODEL, REPO

import logit_codec
from chat_logits.storage.dataset import open_dataset
from explore_logits import execute_analysis, execute_summary

NOTEBOOK = REPO / "notebooks" / "explore_logits.ipynb"


@pytest.fixture(scope="module")
def cells(real_extraction, tmp_path_factory):
    """The code cells, executed beside the 32 conversations' dataset."""
    home = tmp_path_factory.mktemp("checkout") / "notebooks"
    home.mkdir()
    demo = shutil.copytree(real_extraction, home.parent / "outputs" / "demo")
    (home.parent / ".cache").symlink_to(MODEL.parent)
    extraction = json.loads((demo / "extraction.json").read_text(encoding="utf-8"))
    extraction["model_id"] = f".cache/{MODEL.name}"  # as `make demo` records it
    (demo / "extraction.json").write_text(json.dumps(extraction), encoding="utf-8")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPO))
        place = {"metadata": {"path": str(home)}}
        nbclient.NotebookClient(notebook, timeout=300, startup_timeout=300, resources=place).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def text(cells) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", "\n".join(printed(cell) for cell in cells))


def printed(cell) -> str:
    """Everything a cell shows, as text."""
    outputs = (output.get("text") or output.get("data", {}).get("text/plain", "") + "\n" for output in cell.outputs)
    return "".join(outputs)


def shown(cells, kind: str) -> list[str]:
    """What cells show in a form of its own."""
    return [out["data"][kind] for cell in cells for out in cell.outputs if kind in out.get("data", {})]


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.search(pattern, text).groups()]


def test_no_outputs_are_stored_and_there_is_no_logic_of_its_own():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
    assert not re.search(r"^\s*(def|class|while|if|for) ", "\n".join("".join(cell["source"]) for cell in cells), re.M)


def test_rows_and_table(text, real_extraction):
    dataset = open_dataset(str(real_extraction))
    tokens = sum(dataset.read_row(i)["num_tokens"] for i in range(32))
    assert f"32 conversations, {tokens} tokens" in text
    assert dataset.read_row(0)["messages"][0]["content"] in text
    analysis = execute_analysis(str(real_extraction), quiet=True)
    whole = text[text.index("Detailed Token Analysis:") : text.index("of the probability stored")]
    real = [json.loads(line.split(" | ")[0].strip()) for line in whole.splitlines()[4:-1] if " | " in line]
    texts = [token.text.replace(" ", "␣") for token in analysis if token.status != "prompt"]
    assert real[-len(texts) :] == texts
    ten = [line for line in text.splitlines() if re.search(r" \| #\d+", line)]
    expected = sorted((token for token in analysis if token.is_extracted), key=lambda token: token.log_prob)[:10]
    assert [int(re.search(r"#(\d+)", line)[1]) for line in ten] == [token.position for token in expected]


def test_means_and_the_whole_dataset(text, real_extraction):
    totals = execute_analysis(str(real_extraction), quiet=True).totals
    surprisal, entropy = numbers(r"mean surprisal ([\d.]+) nats, mean entropy ([\d.]+) nats", text)
    assert math.exp(surprisal) == pytest.approx(totals.perplexity, rel=1e-3)
    assert entropy == pytest.approx(totals.mean_entropy, abs=1e-4)
    summary = execute_summary(str(real_extraction), quiet=True)
    perplexity, error = numbers(r"perplexity ([\d.]+) calibration error ([\d.]+)", text)
    assert perplexity == pytest.approx(summary.perplexity, abs=0.01)
    assert error == pytest.approx(summary.calibration_error, abs=1e-4)


def test_one_position_by_hand(text, real_extraction):
    position = logit_codec.dequantize_all_logits(open_dataset(str(real_extraction)).read_row(0), 0)
    by_hand, decoded = (re.search(rf"ids {name}: +\[(.*)\]", text)[1].split() for name in ("by hand", "decoded"))
    assert by_hand == decoded == [str(i) for i in position.token_ids[:5]]
    probabilities = [float(number) for number in re.search(r"probabilities: +\[(.*)\]", text)[1].split()]
    np.testing.assert_allclose(probabilities, np.exp(position.log_probs[:5]), atol=5e-5)
    assert re.search(r"weights sum to: 1.0\b", text)


def test_the_tail_is_unbiased_and_the_nucleus_alone_is_not(text):
    truth, mean, alone = numbers(r"truth ([\d.]+) mean of the estimates ([\d.]+) nucleus alone ([\d.]+)", text)
    weights = [1 / rank**1.1 for rank in range(1, 50_001)]
    total = sum(weights)
    assert truth == pytest.approx(-sum(w / total * math.log(w / total) for w in weights), abs=1e-3)
    assert abs(mean - truth) < 0.01 and truth - alone > 2


def test_pages_and_plots_are_shown(cells):
    pages = shown(cells, "text/html")
    assert len(pages) == 2 and all(page.startswith("<iframe") for page in pages)
    assert "Most surprising" in pages[0] and "Calibration" in pages[1]
    assert len(shown(cells, "image/png")) == 2
