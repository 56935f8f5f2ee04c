"""``verify`` against damage of known place and kind, and its figures against loops over the naive decoder's numbers."""

import io
import itertools
import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import plain_decoder
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CONVERSATIONS, MODEL, TEMPLATE
from IPython.core.formatters import DisplayFormatter
from rich.cells import cell_len
from rich.console import Console
from safetensors.torch import load_file, save_file

import explore_logits
import extract_logits
from chat_logits.analysis.verification import check_rows, load_recorded_model, spread, verify
from chat_logits.data.hashing import hash_files
from chat_logits.data.row_alignment import align_row
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.display.results import shown
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage import shard
from chat_logits.storage.dataset import open_dataset
from chat_logits.storage.manifest import EXTRACTION_FILE, Manifest
from chat_logits.storage.shard_list import SHARDS_FILE, shards_text
from logit_codec import ROW_NUMBERS, pack_indices, unpack_indices

ROWS = range(2)  # of a damaged copy; the second is the damaged one
SPREAD = [2 * i + (i == 15) for i in range(16)]  # 0, 2 … 28, 31 of 32 rows
NUMBERS = ("logsumexp", "token_log_probs")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(MODEL))


@pytest.fixture(scope="module")
def undamaged(real_extraction, tokenizer):
    """Every second row through ``verify`` itself, with the model that it loads."""
    return shown(verify(open_dataset(str(real_extraction)), tokenizer, len(SPREAD)))


@pytest.fixture
def rewritten(tmp_path):
    """A copy of a dataset's first rows after ``change(rows)`` and with other keys, whole in all else."""

    def write(source, change=None, **keys):
        manifest = replace(Manifest.read(source / EXTRACTION_FILE, "copy"), **keys)
        (path,) = source.glob("data/*/*.parquet")
        kept = pq.read_table(path).to_pylist()[: len(ROWS)]
        if change:
            change(kept)
        (tmp_path / "copy").mkdir()
        entry = shard.write_shard(tmp_path / "copy", manifest, 0, kept, [])
        (tmp_path / "copy" / EXTRACTION_FILE).write_text(manifest.text)
        (tmp_path / "copy" / SHARDS_FILE).write_text(shards_text([entry]))
        return open_dataset(str(tmp_path / "copy"))

    return write


def extracted(folder, source, *options):
    flags = ["--model_id", MODEL, "--dataset_id", source, "--chat_template", TEMPLATE, "--output_dir", folder, *options]
    assert extract_logits.main([str(flag) for flag in flags]) == 0
    return folder


# --- the figures ---


def plain_figures(dataset, model, tokenizer):
    """A row's KL, and errors of the two numbers, each a list for -1, 0, +1; and its limit. By loops alone."""
    for index in SPREAD:
        row = dataset.read_row(index)
        alignment = align_row(row, tokenizer, dataset.manifest)
        with torch.inference_mode():
            logits = model(torch.tensor(alignment.input_ids)[None]).logits[0].double()
        log_probs, total = logits.log_softmax(-1), logits.logsumexp(-1)
        found = {name: ([], [], []) for name in ("kl", *NUMBERS)}
        for i, position in enumerate(alignment.positions.tolist()):
            decoded = plain_decoder.decode_position(row, i, 64, 16)
            token = alignment.input_ids[position]
            for shift in range(3):
                at = position - 2 + shift
                found["kl"][shift].append(divergence(log_probs[at], decoded))
                found["logsumexp"][shift].append(abs(row["logsumexp"][i] - total[at].item()))
                found["token_log_probs"][shift].append(abs(row["token_log_probs"][i] - log_probs[at, token].item()))
        yield found, 1e-4 * logits.abs().max().item()


def divergence(log_probs, decoded) -> float:
    ids = [token_id for token_id, _ in decoded["nucleus"]]
    p = log_probs[ids].exp().tolist()
    q = [probability for _, probability in decoded["nucleus"]]
    p, q = [*p, max(0.0, 1 - sum(p))], [*q, max(1e-9, 1 - sum(q))]
    return sum(a * math.log(a / (b / sum(q))) for a, b in zip(p, q, strict=True) if a > 0)


def test_figures_are_those_of_plain_loops(undamaged, real_extraction, smollm2, tokenizer):
    rows = list(plain_figures(open_dataset(str(real_extraction)), smollm2[0], tokenizer))
    for name, means in undamaged.shifts.items():
        expected = [np.mean([value for found, _ in rows for value in found[name][shift]]) for shift in range(3)]
        np.testing.assert_allclose(means, expected, rtol=1e-6)
    in_place = [found["kl"][1] for found, _ in rows]
    figures = undamaged.figures
    assert figures["kl_mean"] == pytest.approx(np.mean(list(itertools.chain(*in_place))), rel=1e-6)
    assert figures["kl_row"] == pytest.approx(max(map(np.mean, in_place)), rel=1e-6)
    assert figures["kl_position"] == pytest.approx(max(map(max, in_place)), rel=1e-6)
    for name in NUMBERS:
        worst = max(((max(found[name][1]), limit) for found, limit in rows), key=lambda pair: pair[0] / pair[1])
        assert (figures[name], undamaged.limits[name]) == pytest.approx(worst, rel=1e-6)


def test_an_undamaged_dataset_holds_up(undamaged, real_extraction):
    assert undamaged.holds and undamaged.causes == []
    rows = [open_dataset(str(real_extraction)).read_row(i) for i in SPREAD]
    assert (undamaged.num_rows, undamaged.num_tokens) == (16, sum(row["num_tokens"] for row in rows))
    assert (undamaged.model_id, undamaged.dtype, undamaged.device) == (str(MODEL), "float32", "cpu")
    assert undamaged.figures["kl_mean"] < 2.5e-4 and undamaged.figures["kl_row"] < 4e-4
    assert undamaged.figures["in_order"] == 1
    assert 1e-3 < undamaged.limits["logsumexp"] < 5e-3
    for earlier, in_place, later in undamaged.shifts.values():
        assert 1000 * in_place < min(earlier, later)
    undamaged.print()


# --- damage ---


def entries(row, kind):
    """Codes and ids of a row, (n, width), to be changed."""
    n = row["num_tokens"]
    codes = np.frombuffer(row[f"{kind}_logits_quantized"], np.uint8).reshape(n, -1).copy()
    ids = unpack_indices(row[f"{kind}_indices_low"], row[f"{kind}_indices_high"])
    return codes, ids.reshape(codes.shape).copy()


def put(row, kind, codes, ids):
    low, high = pack_indices(ids)
    columns = {"logits_quantized": codes.tobytes(), "indices_low": low.tolist(), "indices_high": high}
    row.update({f"{kind}_{name}": value for name, value in columns.items()})


def added(column, position, amount):
    def change(rows):
        rows[1][column][position] += amount

    return change


def of_row(column, value):
    def change(rows):
        rows[1][column] = value

    return change


def rolled(by, kinds=("top", "sampled"), numbers=()):
    def change(rows):
        for kind in kinds:
            put(rows[1], kind, *(np.roll(part, by, axis=0) for part in entries(rows[1], kind)))
        for name in numbers:
            rows[1][name] = np.roll(rows[1][name], by).tolist()

    return change


def edited(kind, edit):
    """``edit(codes, ids)`` changes the second row's arrays in place."""

    def change(rows):
        codes, ids = entries(rows[1], kind)
        edit(codes, ids)
        put(rows[1], kind, codes, ids)

    return change


def exchange_ids(codes, ids):
    sizes = (codes > 0).sum(axis=1)
    other = next(i for i in range(5, len(ids)) if sizes[i] == sizes[4] and ids[i, 0] != ids[4, 0])
    ids[[4, other]] = ids[[other, 4]]


def exchange_ranks(codes, ids):
    i = int(np.argmax((codes > 0).sum(axis=1)))
    ids[i, [0, 9]] = ids[i, [9, 0]]


def change_code(codes, _ids):
    codes[7, 0] += 9 if codes[7, 0] < 200 else -9


def cut_short(codes, ids):
    i = int(np.argmax(codes[:, 0] < 150))  # many entries
    size = int((codes[i] > 0).sum())
    codes[i, size // 2 :] = ids[i, size // 2 :] = 0


def change_drawn_codes(codes, _ids):
    codes[11] += 12


def draw_others(_codes, ids):
    ids[6] = (ids[6] + 1000) % 49_000


def draw_the_nucleus(rows):
    (codes, ids), (top_codes, top_ids) = entries(rows[1], "sampled"), entries(rows[1], "top")
    codes[3, :4], ids[3, :4] = top_codes[3, 0], top_ids[3, 0]
    put(rows[1], "sampled", codes, ids)


def leave_id_beside_absent(codes, _ids):
    codes[0, 0] = 0


TOP_IDS, TOP_CODES = "row 1, column top_indices_low/high", "row 1, column top_logits_quantized"
SAMPLED_IDS, SAMPLED_CODES = "row 1, column sampled_indices_low/high", "row 1, column sampled_logits_quantized"
EVERY = r"row 1, columns logsumexp, token_log_probs, top_\*, sampled_\*: shifted by one"
ONCE = r".*\(1 of 60 positions\)"
DAMAGES = {
    "logsumexp": (added("logsumexp", 3, 0.05), f"row 1, column logsumexp, position 3: found {ONCE}"),
    "log-prob": (added("token_log_probs", 59, -0.05), f"row 1, column token_log_probs, position 59: found {ONCE}"),
    "all are the last's": (rolled(1, numbers=NUMBERS), f"{EVERY}.* those of the position before .*"),
    "all are the next's": (rolled(-1, numbers=NUMBERS), f"{EVERY}.* those of the position after .*"),
    "distributions, last's": (rolled(1), r"row 1, columns top_\*, sampled_\*: shifted by one.* position before .*"),
    "distributions, next's": (rolled(-1), r"row 1, columns top_\*, sampled_\*: shifted by one.* position after .*"),
    "nucleus, last's": (rolled(1, ["top"]), r"row 1, columns top_\*: shifted by one.* position before .*"),
    "draws, last's": (rolled(1, ["sampled"]), f"{SAMPLED_IDS}, position 0, entry 0: .*"),
    "ids": (edited("top", exchange_ids), rf"{TOP_IDS}, position 4, entry 0: .*\(2 of 60 positions\)"),
    "ranks": (edited("top", exchange_ranks), rf"{TOP_IDS}, position \d+, entry 0: {ONCE}"),
    "code": (edited("top", change_code), f"{TOP_CODES}, position 7, entry 0: found code {ONCE}"),
    "cut": (edited("top", cut_short), rf"{TOP_CODES}, position \d+: found a nucleus of 32, expected 64 {ONCE}"),
    "drawn codes": (edited("sampled", change_drawn_codes), f"{SAMPLED_CODES}, position 11, entry 0: {ONCE}"),
    "drawn ids": (edited("sampled", draw_others), f"{SAMPLED_IDS}, position 6, entry 0: {ONCE}"),
    "nucleus drawn": (draw_the_nucleus, f"{SAMPLED_IDS}, position 3, entry 0: {ONCE}"),
    "mean NLL": (of_row("mean_nll", 3.0), "row 1, column mean_nll, found 3, expected {mean_nll} from .*columns"),
    "entropy": (of_row("mean_entropy", 0.0), "row 1, column mean_entropy, found 0, expected {mean_entropy} from .*"),
    "top-1 rate": (of_row("top1_rate", 1.0), "row 1, column top1_rate, found 1, expected {top1_rate} from .*"),
    "largest": (
        of_row("max_surprisal", 0.5),
        "row 1, column max_surprisal, found 0.5, expected {max_surprisal} from .*",
    ),
    "unreadable": (edited("top", leave_id_beside_absent), "column top_indices_low of row 1: .*, expected id 0 there"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_cause_is_the_damage(damage, rewritten, real_extraction, smollm2, tokenizer):
    change, expected = DAMAGES[damage]
    row = open_dataset(str(real_extraction)).read_row(1)
    for name in ROW_NUMBERS:
        expected = expected.replace("{" + name + "}", re.escape(f"{row[name]:.8g}"))
    (cause,) = check_rows(rewritten(real_extraction, change), smollm2[0], tokenizer, ROWS).causes
    print(cause)
    assert re.fullmatch(expected, cause) and "also wrong" not in cause


def test_what_is_wrong_in_every_row_need_not_be_the_model(rewritten, real_extraction, smollm2, tokenizer):
    def change(rows):
        for row in rows:
            row["logsumexp"] = [value + 1 for value in row["logsumexp"]]

    causes = check_rows(rewritten(real_extraction, change), smollm2[0], tokenizer, ROWS).causes
    assert [cause[:24] for cause in causes] == ["row 0, column logsumexp,", "row 1, column logsumexp,"]


def test_another_template_is_named(rewritten, real_extraction, smollm2, tokenizer):
    template = TEMPLATE.read_text(encoding="utf-8").replace("helpful", "hasty")
    found = check_rows(rewritten(real_extraction, chat_template=template), smollm2[0], tokenizer, ROWS)
    assert [cause.partition(": the")[0] for cause in found.causes] == [
        f"row {i}: column alignment_checksum" for i in ROWS
    ]
    assert all("The messages, the template or the tokenizer have changed" in cause for cause in found.causes)
    assert found.num_tokens == 0 and math.isnan(found.figures["kl_mean"])


def test_codes_of_another_row_as_long(rewritten, chat_file, tmp_path, smollm2, tokenizer):
    answers = ["The wall is red and warm.", "My roof was old and flat."]
    chats = chat_file([{"question": "What is new?", "answer": answer} for answer in answers])
    whole = extracted(tmp_path / "whole", chats, "--top_p", 1)  # so that all positions have as many entries
    assert check_rows(open_dataset(str(whole)), smollm2[0], tokenizer, ROWS).holds

    def change(rows):
        assert rows[0]["num_tokens"] == rows[1]["num_tokens"]
        codes = [row["top_logits_quantized"] for row in rows]
        rows[0]["top_logits_quantized"], rows[1]["top_logits_quantized"] = reversed(codes)

    causes = check_rows(rewritten(whole, change), smollm2[0], tokenizer, ROWS).causes
    assert len(causes) == 2
    for i, cause in enumerate(causes):  # what is said of the first token is the same in both
        assert cause.startswith(f"row {i}, column top_logits_quantized, position 1, ") and "also wrong" not in cause


def test_bfloat16_holds_up_and_a_shift_in_it_is_found(rewritten, tmp_path, tokenizer):
    folder = extracted(tmp_path / "half", CONVERSATIONS, "--dtype", "bfloat16", "--max_samples", 2)
    dataset = open_dataset(str(folder))
    model = load_recorded_model(dataset)
    found = check_rows(dataset, model, tokenizer, ROWS)
    shown(found).print()
    assert found.holds and found.dtype == "bfloat16"
    (cause,) = check_rows(rewritten(folder, rolled(1, numbers=NUMBERS)), model, tokenizer, ROWS).causes
    print(cause)
    assert "shifted by one" in cause and "position before" in cause


# --- the model ---


def test_another_model_is_named_as_the_cause(rewritten, real_extraction, small_model, tiny_model, tokenizer):
    dataset = rewritten(real_extraction)
    (cause,) = verify(dataset, tokenizer, 2, str(small_model)).causes
    print(cause)
    recorded = f"{MODEL} at {hash_files(MODEL)[:12]}"
    assert cause.startswith("wrong throughout, 2 of 2 rows: the model is probably not the one extracted from")
    assert recorded in cause and cause.endswith(f"{small_model} are others ({hash_files(small_model)[:12]})")
    with pytest.raises(UsageError, match=f"of 262144, expected 49152; .* {re.escape(recorded)}. Name another"):
        verify(dataset, tokenizer, 2, str(tiny_model))


def test_the_model_may_lie_elsewhere(rewritten, real_extraction, quick_model, tmp_path, tokenizer, capsys):
    """Which the command says, of the model, not of its tokenizer; one with another tokenizer is wrong use."""
    dataset = rewritten(real_extraction, model_id="not/here")
    assert explore_logits.main([dataset.dataset_id, "--verify", "1"]) == 1
    assert capsys.readouterr().err.endswith("which is not here. Say where it lies now: --model_id FOLDER\n")
    assert explore_logits.main([dataset.dataset_id, "--verify", "1", "--model_id", str(quick_model)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: tokenizer of {quick_model}: ") and told.endswith(" Name another with --model_id.")
    with pytest.raises(ToolkitError, match="the model was the local folder not/here, which is not here"):
        verify(dataset, tokenizer, 1)
    (tmp_path / "elsewhere").symlink_to(MODEL)
    assert verify(dataset, tokenizer, 1, str(tmp_path / "elsewhere")).holds


def test_a_model_may_be_spread_or_on_a_device_of_ones_choice(quick_run, capsys):
    """Spread, without room in memory for all of it, it gives what it gives on one device; so do both commands."""
    plain = explore_logits.execute_verification(str(quick_run), 2, quiet=True)
    spread_over = explore_logits.execute_verification(str(quick_run), 2, quiet=True, device_map="auto")
    assert plain.holds and spread_over.holds
    assert spread_over.figures == pytest.approx(plain.figures, abs=1e-6)
    command = [str(quick_run), "--verify", "2"]
    assert explore_logits.main([*command, "--device", "cpu"]) == 0
    for wrong, said in (
        (["--verify", "1", "--device", "cuda:7"], "--device cuda:7: "),
        (
            ["--verify", "1", "--device", "cpu", "--device_map", "auto"],
            "--device cpu: --device_map chooses the devices",
        ),
        (["--device", "cpu"], "--device is for --verify and --student"),
    ):
        assert explore_logits.main([str(quick_run), *wrong]) == 2
        assert said in capsys.readouterr().err


# --- what is printed ---


def test_the_tables_have_all_figures_and_end_with_the_verdict(undamaged):
    lines = printed(undamaged)
    assert lines[0].startswith(f"Checked 16 rows, {undamaged.num_tokens} tokens against ")
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines if " | " in line]
    assert cells[0] == ["Measure, nats", "Measured", "Limit"] and cells[7] == [
        "Mean error, nats, least at 0",
        "at -1",
        "at 0",
        "at +1",
    ]
    for row, key in zip(cells[1:7], undamaged.figures, strict=True):
        assert float(row[1]) == pytest.approx(undamaged.figures[key], rel=0.05)
        assert row[2] == "-" if key == "kl_mean" else float(row[2]) == pytest.approx(undamaged.limits[key], rel=0.05)
    for row, key in zip(cells[8:], undamaged.shifts, strict=True):
        assert [float(cell) for cell in row[1:]] == pytest.approx(undamaged.shifts[key], rel=0.05)
    assert lines[-1] == "Holds up: the stored numbers are the model's."


@pytest.mark.parametrize("width", [40, 60, 70, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_cut(undamaged, width):
    large = dict.fromkeys(undamaged.figures, 123_456.789)
    shifts = {name: [123.456, 1e-12, 987.654] for name in undamaged.shifts}
    causes = [f"row {i}, column top_indices_low/high, position 7: found {'東京' * 30}" for i in range(7)]
    for found in (undamaged, replace(undamaged, figures=large, shifts=shifts, causes=causes, model_id="/long" * 50)):
        lines = printed(found, width)
        assert max(map(cell_len, lines)) <= width
        tables = [line.split(" | ") for line in lines if " | " in line]
        assert len(tables) == 11 and not any("…" in cell for row in tables for cell in row[1:])
        assert len({row[0] for row in tables}) == 11  # cut or not, each can be told
    text = "".join(lines)
    assert "123.456" in text and "987.654" in text and "1.2e+05" in text and "… and 2 more" in text


def test_what_is_counted_and_where_it_has_no_page(undamaged):
    one = replace(undamaged, num_rows=1, num_tokens=1, causes=["row 0: damaged"])
    assert printed(one)[0].startswith("Checked 1 row, 1 token against ")
    assert repr(one) == f"<Verification of {undamaged.dataset_id}: 1 conversation, 1 token, does not hold up>"
    assert repr(undamaged).endswith("tokens, holds up>") and str(undamaged).splitlines() == printed(undamaged)
    formatted, _ = DisplayFormatter().format(undamaged)
    assert formatted == {"text/plain": repr(undamaged)}


def test_five_causes_are_printed_and_all_are_in_the_json(undamaged):
    broken = replace(undamaged, causes=[f"row {i}: \x1b[31m" for i in range(7)])
    lines = printed(broken)
    assert lines[-7:] == ["Does not hold up:", *(rf"row {i}: \x1b[31m" for i in range(5)), "… and 2 more"]
    content = json.loads(broken.to_json())
    assert (content["logit_dataset_id"], content["model_id"]) == (undamaged.dataset_id, str(MODEL))
    assert not {"dataset_id", "model"} & content.keys()
    assert content["causes"] == broken.causes and content["holds"] is False
    assert content["figures"] == undamaged.figures and content["shifts"] == undamaged.shifts


def printed(verification, width: int | None = None) -> list[str]:
    """The lines; a width makes it a terminal."""
    buffer = io.StringIO()
    terminal = {"width": width, "force_terminal": True, "legacy_windows": False, "color_system": None} if width else {}
    verification.print(Console(file=buffer, highlight=False, **terminal))
    return buffer.getvalue().splitlines()


def test_rows_are_spread_evenly():
    for rows, count in itertools.product(range(1, 30), repeat=2):
        found = spread(rows, count)
        assert len(found) == min(rows, count) and found[0] == 0
        assert count == 1 or found[-1] == rows - 1
        gaps = [b - a for a, b in itertools.pairwise(found)]
        assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


def test_a_count_below_one_is_refused(real_extraction, tokenizer):
    with pytest.raises(UsageError, match="`verify` 0: expected 1 row or more"):
        verify(open_dataset(str(real_extraction)), tokenizer, 0)


def test_a_checkpoint_that_is_not_whole_is_refused_as_at_extraction(quick_run, quick_model, tmp_path, capsys):
    """By the names of the tensors that transformers would fill at random; nothing is compared."""
    folder = shutil.copytree(quick_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    flags = ["--logit_dataset_id", quick_run, "--verify", "1", "--model_id", folder]
    assert explore_logits.main([*map(str, flags)]) == 1
    said = capsys.readouterr()
    message = f"error: model {folder}: its checkpoint is not whole: 1 tensors are missing (model.norm.weight)"
    assert message in " ".join(said.err.split()) and not said.out
