"""What is written for other trainers: against a construction from single positions by the formats' definitions, against
TRL's own collators, and the gradient of a loss that renormalises what is written."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

import export_targets
import extract_logits
from chat_logits.analysis.opening import open_with_tokenizer
from chat_logits.data.row_alignment import RowAligner
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.training import export_files
from chat_logits.training.export_formats import FORMATS, merged
from chat_logits.training.loss import sparse_kd_loss
from chat_logits.training.targets import Targets, row_targets
from logit_codec import dequantize_all_logits

VOCABULARY = 4096  # of quick_model
IGNORED = -100
SOME = 6  # conversations that are compared number by number
TEMPLATE_WITH_TOOLS = (
    "{{ tools | tojson if tools else '' }}{% for message in messages %}<|im_start|>{{ message.role[0] }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def aligned(quick_run) -> list[tuple]:
    return aligned_rows(quick_run)


def loaded(folder: Path):
    """The rows of an export, as a reader has them."""
    return load_dataset(str(folder), split="train", cache_dir=f"{folder}.cache")


def aligned_rows(folder: Path) -> list[tuple]:
    """The rows of a dataset with their alignments."""
    dataset, tokenizer = open_with_tokenizer(str(folder))
    aligner = RowAligner(tokenizer, dataset.manifest)
    return [(row, aligner.align(row)) for row in dataset.rows()]


@pytest.fixture(scope="module")
def small_run(quick_model, tmp_path_factory):
    """Extracts conversations of different words with few entries a position, one at most from the nucleus.

    Of the first three, one has a message with a name, and one has tools.
    """

    def extract(num_sampled: int) -> Path:
        folder = tmp_path_factory.mktemp("small")
        ask, answer = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It is I, and no other."}
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        rows = [[ask, answer], [{**ask, "name": "Ann"}, answer], [ask, answer]]
        words = ("sea", "mountain", "light of day", "old garden", "strange kind of music", "letter")
        rows += [[ask, {"role": "assistant", "content": f"It is the {word}, as it was."}] for word in words]
        samples = [{"messages": messages, "tools": [tool] if i == 2 else None} for i, messages in enumerate(rows)]
        source = folder / "chats.jsonl"
        source.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
        options = {"model_id": quick_model, "dataset_id": source, "output_dir": folder / "out", "device": "cpu"}
        options |= {"chat_template": TEMPLATE_WITH_TOOLS, "top_k": 1, "num_sampled": num_sampled}
        assert extract_logits.main([str(part) for name, value in options.items() for part in (f"--{name}", value)]) == 0
        return folder / "out"

    return functools.cache(extract)


@pytest.fixture(scope="module")
def written(quick_run, tmp_path_factory):
    """The rows of a format, as ``load_dataset`` reads them, and what the export said; each made once."""
    folder, made = tmp_path_factory.mktemp("exports"), {}

    def get(name: str, **options):
        key = json.dumps([name, options])
        if key not in made:
            out = folder / str(len(made))
            exported = export_targets.export_targets(str(quick_run), out, name, **options)
            made[key] = loaded(out), exported
        return made[key]

    return get


def expected_weights(row: dict, alignment) -> dict[int, dict[int, float]]:
    """By target position: the weights of its ids, from the codec's reading of single positions."""
    expected = {end: {int(alignment.input_ids[end]): 1.0} for end in alignment.turn_ends}
    for i, position in enumerate(alignment.positions.tolist()):
        read = dequantize_all_logits(row, i)
        weights = zip(read.token_ids.tolist(), read.weights.tolist(), strict=True)
        expected[position] = {token_id: weight for token_id, weight in weights if weight}
    return expected


def assert_weights(ids, log_weights, expected: dict[int, float]) -> None:
    """Each id once, and the weights, as logarithms, within 1e-5 of a weight."""
    assert len(set(ids)) == len(ids)
    assert dict(zip(ids, np.exp(log_weights).tolist(), strict=True)) == pytest.approx(expected, rel=1e-5, abs=1e-7)


# --- the formats, row by row ---


def test_plain_has_the_targets(written, aligned):
    rows, exported = written("plain")
    assert rows.column_names == ["input_ids", "labels", "positions", "ids", "weights"]
    assert len(rows) == len(aligned) == exported.num_rows
    for found, (row, alignment) in zip(rows, aligned, strict=True):
        targets = row_targets(row, alignment)
        assert found["input_ids"] == alignment.input_ids.tolist()
        assert found["positions"] == targets.positions.tolist()
        taught = set(found["positions"])
        assert found["labels"] == [t if i in taught else IGNORED for i, t in enumerate(found["input_ids"])]
        assert found["ids"] == targets.token_ids.tolist() and found["weights"] == targets.weights.tolist()
    assert exported.num_positions == sum(len(found["positions"]) for found in rows)


def test_axolotl_has_at_token_t_what_predicts_the_next(written, aligned):
    rows, _ = written("axolotl")
    target_columns = ["target_token_ids", "target_logprobs", "target_mask"]
    assert rows.column_names == ["input_ids", "labels", "attention_mask", *target_columns]
    for found, (row, alignment) in zip(rows.select(range(SOME)), aligned, strict=False):
        expected = expected_weights(row, alignment)
        assert found["input_ids"] == alignment.input_ids.tolist()
        assert found["labels"] == [t if i in expected else IGNORED for i, t in enumerate(found["input_ids"])]
        assert set(found["attention_mask"]) == {1} and len(found["attention_mask"]) == len(found["input_ids"])
        columns = [found[name] for name in target_columns]
        assert {len(column) for column in columns} == {len(found["input_ids"])}
        for t, (ids, log_weights, mask) in enumerate(zip(*columns, strict=True)):
            assert mask == [1] * len(ids)
            assert log_weights == sorted(log_weights, reverse=True)
            assert_weights(ids, log_weights, expected.get(t + 1, {}))


def test_distillkit_has_one_shape_and_labels_where_a_row_counts(written, aligned):
    rows, _ = written("distillkit")
    assert rows.column_names == ["input_ids", "labels", "token_ids", "top_values"]
    length = max(len(alignment.input_ids) for _, alignment in aligned)
    for found, (row, alignment) in zip(rows.select(range(SOME)), aligned, strict=False):
        expected = expected_weights(row, alignment)
        ids, values = np.array(found["token_ids"]), np.array(found["top_values"], np.float32)
        assert ids.shape == values.shape == (length, 64 + 16)
        padding = length - len(alignment.input_ids)
        assert found["input_ids"] == alignment.input_ids.tolist() + [0] * padding
        counted = [position - 1 for position in sorted(expected)]
        assert [t for t, label in enumerate(found["labels"]) if label >= 0] == counted
        assert [found["labels"][t] for t in counted] == alignment.input_ids[counted].tolist()
        np.testing.assert_allclose(np.exp(values).sum(axis=1), 1, atol=1e-6)  # no NaN where it is renormalised
        assert np.isfinite(values.astype(np.float16)).all()
        for t in counted:
            present = np.exp(values[t]) > 0
            assert_weights(ids[t, present].tolist(), values[t, present], expected[t + 1])


def test_trls_collators_take_ids_and_labels_as_they_are(written, quick_model):
    from transformers import AutoTokenizer
    from trl.experimental.utils import DataCollatorForChatML
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows, _ = written("trl")
    rows, plain = rows.select(range(4)).to_list(), written("plain")[0].select(range(4)).to_list()
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    for i, (row, same) in enumerate(zip(rows, plain, strict=True)):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert row["messages"][1]["content"].startswith("It is")
        n = len(same["input_ids"])
        assert batch["input_ids"][i, :n].tolist() == same["input_ids"]
        assert batch["labels"][i].tolist() == same["labels"] + [IGNORED] * (batch["labels"].shape[1] - n)
    tokenizer = AutoTokenizer.from_pretrained(quick_model)
    asked = DataCollatorForChatML(tokenizer, max_length=1000)(rows)
    for i, same in enumerate(plain):
        prompt = same["input_ids"][: same["positions"][0]]
        assert asked["prompts"][i, -len(prompt) :].tolist() == prompt
        kept = asked["attention_mask"][i].bool()
        assert asked["input_ids"][i, kept].tolist() == same["input_ids"]
        taught = set(asked["labels"][i].tolist()) - {IGNORED}
        assert taught >= {label for label in same["labels"] if label != IGNORED}


def test_the_hard_share_and_the_ends_of_turns(written, aligned):
    rows, _ = written("axolotl", hard_weight=0.25, end_of_turn="skip")
    found, (row, alignment) = rows[1], aligned[1]
    assert alignment.turn_ends
    expected = expected_weights(row, alignment)
    for t, ids in enumerate(found["target_token_ids"]):
        mixed = {}
        if t + 1 in alignment.positions:
            mixed = {token_id: 0.75 * weight for token_id, weight in expected[t + 1].items()}
            target = int(alignment.input_ids[t + 1])
            mixed[target] = mixed.get(target, 0) + 0.25
        assert_weights(ids, found["target_logprobs"][t], mixed)


def test_a_hard_share_has_a_place_of_its_own_in_the_shape(small_run, tmp_path):
    export_targets.export_targets(str(small_run(1)), tmp_path / "out", "distillkit", hard_weight=0.25)
    values = np.array(loaded(tmp_path / "out")["top_values"][:])
    assert values.shape[2] == 1 + 1 + 1 and (np.exp(values) > 0).sum(axis=2).max() == 3


# --- the gradient ---


def renormalised_loss(logits, log_weights) -> torch.Tensor:
    """What a trainer makes of a position's top-k: both logarithms, the teacher's scaled to a total of 1."""
    teacher = log_weights.double().log_softmax(dim=-1)
    return (teacher.exp() * (teacher - logits)).sum()


@pytest.mark.parametrize("name", ["axolotl", "distillkit"])
def test_a_loss_that_renormalises_has_our_gradient(written, aligned, name):
    """Within 1e-6 in every entry; its value is ours, and a constant for the entropy of the weights."""
    rows, _ = written(name)
    ids_of, values_of = FORMATS[name].schema.names[-3:-1] if name == "axolotl" else FORMATS[name].schema.names[-2:]
    for found, (row, alignment) in list(zip(rows.select(range(SOME)), aligned, strict=False))[3:]:
        targets = row_targets(row, alignment)
        n = len(alignment.input_ids)
        logits = torch.randn(n, VOCABULARY, generator=torch.Generator().manual_seed(n)) * 3
        logits = logits.double().requires_grad_()
        q, loss, constant = logits.log_softmax(dim=1), 0.0, 0.0
        for t in range(n):
            counts = found["labels"][t] >= 0 if name == "distillkit" else bool(found["target_mask"][t])
            if counts:
                log_weights = torch.tensor(found[values_of][t])
                loss = loss + renormalised_loss(q[t, found[ids_of][t]], log_weights)
                constant += (log_weights.double().exp() * log_weights).sum().item()
        ours = logits.detach().float().requires_grad_()
        target = torch.tensor(targets.token_ids), torch.tensor(targets.weights)
        expected = sparse_kd_loss(ours[targets.positions - 1], *target, reduction="sum")
        loss.backward()
        expected.backward()
        assert (logits.grad - ours.grad).abs().max() < 1e-6
        assert loss.item() - constant == pytest.approx(expected.item(), rel=1e-6)


def test_merged_adds_up_weights_of_the_same_id():
    """Against a dictionary a position, over random targets with repeated and absent ids, and a position of one."""
    random = np.random.default_rng(0)
    ids, weights = random.integers(0, 6, (50, 9)).astype(np.int32), random.random((50, 9)).astype(np.float32)
    weights[random.random((50, 9)) < 0.4] = 0
    weights[:, 0], weights[7] = 0.5, [0.25, *[0] * 8]
    entries = merged(Targets(np.arange(50), ids, weights, np.zeros(50), np.zeros(50)))
    ends = np.cumsum(entries.counts)
    for i, end in enumerate(ends):
        own = slice(end - entries.counts[i], end)
        expected: dict[int, float] = {}
        for token_id, weight in zip(ids[i].tolist(), weights[i].tolist(), strict=True):
            if weight:
                expected[token_id] = expected.get(token_id, 0) + weight
        assert_weights(entries.token_ids[own].tolist(), entries.log_weights[own], expected)
    assert ends[-1] == len(entries.token_ids)


# --- a student with fewer ids ---


def test_ids_beyond_the_students_are_dropped_and_counted(small_run, tmp_path):
    aligned = aligned_rows(small_run(1))
    limit = sorted(int(alignment.input_ids.max()) for _, alignment in aligned)[len(aligned) // 2] + 1
    kept, lost, empty = [], [], 0
    for row, alignment in aligned:
        if alignment.input_ids.max() >= limit:
            continue
        inside = {}
        for position, weights in expected_weights(row, alignment).items():
            left = {token_id: weight for token_id, weight in weights.items() if token_id < limit}
            if left:
                inside[position] = left
                lost.append(sum(weights.values()) - sum(left.values()))
            empty += not left
        kept.append(inside)
    assert 0 < len(kept) < len(aligned) and sum(lost) > 1 and empty  # or this test says nothing
    exported = export_targets.export_targets(str(small_run(1)), tmp_path / "out", "axolotl", student_vocab_size=limit)
    assert dict(exported.left_out) == {f"with token ids beyond the student's {limit:,}": len(aligned) - len(kept)}
    assert (exported.num_rows, exported.num_positions) == (len(kept), sum(map(len, kept)))
    assert exported.positions_left_out == empty
    assert exported.lost == pytest.approx(sum(lost), rel=1e-4)
    assert exported.most_lost == pytest.approx(max(lost), rel=1e-4)
    rows = loaded(tmp_path / "out")
    for found, inside in zip(rows, kept, strict=True):
        for t, ids in enumerate(found["target_token_ids"]):
            assert_weights(ids, found["target_logprobs"][t], inside.get(t + 1, {}))


def test_what_is_left_out_is_printed(small_run, tmp_path, capsys):
    sizes = [(alignment.input_ids.max(), len(alignment.input_ids)) for _, alignment in aligned_rows(small_run(1))]
    limit = int(max(largest for largest, _ in sizes))
    lengths = sorted(length for largest, length in sizes if largest < limit)
    length = lengths[len(lengths) // 2]
    beyond, too_long = len(sizes) - len(lengths), sum(each > length for each in lengths)
    assert beyond and too_long
    out = tmp_path / "out"
    options = ["--format", "distillkit", "--student-vocab-size", str(limit), "--sequence_length", str(length)]
    capsys.readouterr()
    assert export_targets.main([str(small_run(1)), "--output_dir", str(out), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(
        rf"Wrote {len(lengths) - too_long} conversations with \d+ targets to {out} \(distillkit, ", lines[0]
    )
    assert f"Left out: conversations with token ids beyond the student's {limit:,}: {beyond}" in lines
    assert f"Left out: conversations of more than {length} tokens: {too_long}" in lines
    assert {len(ids) for ids in loaded(out)["input_ids"]} == {length}


@pytest.mark.parametrize("name", ["axolotl", "distillkit"])
def test_each_conversation_is_aligned_once(small_run, tmp_path, monkeypatch, name):
    """One with the largest id is left out, so it does not count for the length of all either."""
    sizes = [(int(alignment.input_ids.max()), len(alignment.input_ids)) for _, alignment in aligned_rows(small_run(1))]
    limit, seen = max(sizes)[0], []
    align_all = RowAligner.align_all
    monkeypatch.setattr(
        RowAligner, "align_all", lambda own, rows, *rest: seen.extend(rows) or align_all(own, rows, *rest)
    )
    export_targets.export_targets(str(small_run(1)), tmp_path / "out", name, student_vocab_size=limit)
    assert len(seen) == len(sizes)
    lengths = [length for largest, length in sizes if largest < limit]
    if name == "distillkit":
        lengths = [max(lengths)] * len(lengths)
    assert [len(ids) for ids in loaded(tmp_path / "out")["input_ids"]] == lengths
    assert max(lengths) < max(length for _, length in sizes)  # or this test says less
    assert names_in(tmp_path / "out") == ["train-00000.parquet"]


# --- files ---


def test_several_files_of_several_groups_have_the_same_rows(small_run, tmp_path, monkeypatch):
    whole = export_targets.export_targets(str(small_run(1)), tmp_path / "whole", "plain")
    assert [file.name for file in whole.files] == ["train-00000.parquet"]
    monkeypatch.setattr(export_files, "GROUP_BYTES", 1000)
    monkeypatch.setattr(export_files, "FILE_BYTES", 2500)
    split = export_targets.export_targets(str(small_run(1)), tmp_path / "split", "plain")
    assert [file.name for file in split.files[:2]] == ["train-00000.parquet", "train-00001.parquet"]
    assert sorted((tmp_path / "split").iterdir()) == split.files
    assert pq.ParquetFile(split.files[0]).num_row_groups > 1
    assert loaded(tmp_path / "split").to_list() == loaded(tmp_path / "whole").to_list()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_whole_or_not_there(small_run, tmp_path, monkeypatch):
    class Broken(Exception):
        pass

    def broken(*_args):
        raise Broken

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(export_files, "written_whole", broken)
    for name in ("empty", "new"):
        with pytest.raises(Broken):
            export_targets.export_targets(str(small_run(1)), tmp_path / name, "trl")
    assert names_in(tmp_path) == ["empty"] and not names_in(tmp_path / "empty")
    monkeypatch.undo()
    export_targets.export_targets(str(small_run(1)), tmp_path / "empty", "trl")
    assert names_in(tmp_path / "empty") == ["train-00000.parquet"]
    assert names_in(tmp_path) == ["empty"]


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "2"], r"error: --temperature 2: expected 1\. .* at T = 2 the loss is 117% too large"),
        (["--sequence_length", "9"], "error: --sequence_length is for a format of one length, and --format plain has"),
        (["--hard_weight", "1.5"], "error: --hard_weight 1.5: expected 0 to 1"),
        (["--format", "maxtext"], "error: --format maxtext: expected one of plain, axolotl, distillkit, trl"),
        (
            ["--output_dir", "filled"],
            "error: --output_dir filled: holds files, such as file; expected a new or an",
        ),
        (["--output_dir", "filled/file"], "error: --output_dir filled/file: a file, expected a new or an empty folder"),
    ],
)
def test_wrong_use_is_one_line_and_nothing_is_written(quick_run, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    Path("filled").mkdir()
    Path("filled/file").touch()
    assert export_targets.main([str(quick_run), "--format", "plain", "--output_dir", "out", *options]) == 2
    assert re.match(message, capsys.readouterr().err)
    assert names_in(tmp_path) == ["filled"]


def test_a_student_that_can_read_nothing_gets_nothing(small_run, tmp_path):
    with pytest.raises(ToolkitError, match="all conversations are left out: 9 with token ids beyond the student's 2"):
        export_targets.export_targets(str(small_run(1)), tmp_path / "out", "plain", student_vocab_size=2)
    assert not names_in(tmp_path)


def test_without_draws_it_is_refused_unless_asked_for(small_run, tmp_path, capsys):
    command = [str(small_run(0)), "--format", "axolotl", "--output_dir", str(tmp_path / "out")]
    assert export_targets.main(command) == 2
    assert "no draws from the tail (`num_sampled` 0)" in capsys.readouterr().err
    assert export_targets.main([*command, "--allow_biased"]) == 0
    rows = loaded(tmp_path / "out")
    totals = [np.exp(values).sum() for values in rows[0]["target_logprobs"] if values]
    assert totals == pytest.approx([1] * len(totals), abs=1e-6)


def test_conversations_that_trls_columns_have_no_place_for_are_left_out(small_run, tmp_path):
    exported = export_targets.export_targets(str(small_run(1)), tmp_path / "out", "trl")
    assert exported.num_rows == 7
    assert dict(exported.left_out) == {"with tools, or with messages of more than a role and a content": 2}


def test_a_format_that_is_not_known_is_refused_from_python(quick_run, tmp_path):
    with pytest.raises(UsageError, match="`format` parquet: expected one of plain, axolotl, distillkit, trl"):
        export_targets.export_targets(str(quick_run), tmp_path / "out", "parquet")
