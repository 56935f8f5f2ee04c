"""Training examples: against a slow construction, and read in the ways that trainers read: workers, ranks, resumed."""

import json
import math
import pickle
import resource
import shutil
import signal
import zlib
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO, TEMPLATE
from datasets.distributed import split_dataset_by_node
from lives import Server
from loopback_hub import LoopbackHub
from random_models import random_model
from runs import shards_in
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, TrainingArguments

from chat_logits.analysis.opening import open_with_tokenizer
from chat_logits.data.row_alignment import AlignmentError, align_row
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.shard import METADATA_KEY, SCHEMA, DamagedShard
from chat_logits.training import dataset
from chat_logits.training.collator import PackingCollator
from chat_logits.training.dataset import check_student_tokenizer, training_dataset
from chat_logits.training.examples import ExampleMaker
from chat_logits.training.student import StudentTrainer
from logit_codec import decode_row

TALKS = [
    [("user", "Hi"), ("assistant", "Hello!"), ("user", "2+2?"), ("assistant", "It is four, of course.")],
    [("system", "Be brief."), ("user", "And 3+3?"), ("assistant", "Six.")],
    [
        ("user", "One"),
        ("assistant", "Two"),
        ("user", "Three"),
        ("assistant", "Four"),
        ("user", "5?"),
        ("assistant", "6"),
    ],
    [("user", "Bye"), ("assistant", "Goodbye, and come again.")],
]
ROWS = 160  # of the run of runs.py: 180 less the 20 that have nothing to say


@pytest.fixture(autouse=True)
def workers_end():
    """Ray, used earlier in this process, has a handler of SIGTERM, by which datasets' forked workers may not end."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def talks(quick_model, shared) -> Path:
    """A run of talks of several turns; five and three entries a position leave rows that end within a byte."""
    import extract_logits

    def make(folder: Path) -> None:
        rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in TALKS]
        (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options = {"model_id": quick_model, "dataset_id": folder / "talks.jsonl", "chat_template": TEMPLATE}
        options |= {"output_dir": folder / "out", "device": "cpu", "top_k": 5, "num_sampled": 3, "rows_per_shard": 3}
        flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        assert extract_logits.main(flags) == 0

    return shared("talks", make) / "out"


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Callable:
    """``training_dataset`` with a cache of this module's own."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return lambda *args, **options: training_dataset(*args, cache_dir=cache, **options)


def slow_example(row: dict, tokenizer, manifest, hard_weight: float = 0.0, end_of_turn: str = "hard") -> dict:
    """A row's example, a position and an entry at a time."""
    alignment, decoded = align_row(row, tokenizer, manifest), decode_row(row)
    taught = {}
    for i, position in enumerate(alignment.positions.tolist()):
        nucleus = [math.exp(log_prob) for log_prob in decoded.top_log_probs[i]]
        draws = [math.isfinite(log_prob) for log_prob in decoded.sampled_log_probs[i]]
        share = max(0.0, 1 - sum(nucleus)) / len(draws)
        weights = [*nucleus, *(share * drawn for drawn in draws)]
        log_probs = [*decoded.top_log_probs[i], *decoded.sampled_log_probs[i]]
        total = sum(weights)
        surprise = -sum(
            weight / total * log_prob for weight, log_prob in zip(weights, log_probs, strict=True) if weight
        )
        ids = [int(alignment.input_ids[position]) if hard_weight else 0, *decoded.top_ids[i], *decoded.sampled_ids[i]]
        mixed = [hard_weight, *((1 - hard_weight) * weight / total for weight in weights)]
        drawn = zip(mixed[-len(draws) :], decoded.sampled_log_probs[i], strict=True)
        tail = -sum(weight * (log_prob - math.log(total)) for weight, log_prob in drawn if weight)
        taught[position] = ids, mixed, (1 - hard_weight) * (math.log(total) + surprise), tail
    for end in alignment.turn_ends if end_of_turn == "hard" else ():
        if alignment.reasons[end] is not None:
            width = decoded.top_ids.shape[1] + decoded.sampled_ids.shape[1]
            taught[end] = [int(alignment.input_ids[end]), *[0] * width], [1.0, *[0.0] * width], 0.0, 0.0
    positions = sorted(taught)
    return {
        "input_ids": alignment.input_ids.tolist(),
        "labels": [int(token) if i in taught else -100 for i, token in enumerate(alignment.input_ids)],
        "positions": positions,
        "target_ids": [taught[position][0] for position in positions],
        "target_weights": [taught[position][1] for position in positions],
        "entropy": [taught[position][2] for position in positions],
        "tail_entropy": [taught[position][3] for position in positions],
        "num_sampled": decoded.sampled_ids.shape[1],
        "source_index": row["source_index"],
    }


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


SETTINGS = {"plain": {}, "hard labels too": {"hard_weight": 0.25}, "no ends of turns": {"end_of_turn": "skip"}}


@pytest.mark.parametrize("run", ["talks", "quick_run"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_examples_are_what_a_slow_construction_gives(run, settings, opened, request):
    """Ids, labels and positions exactly; weights to the last bit of float32, as their sums run in another order."""
    folder = request.getfixturevalue(run)
    stored, tokenizer = open_with_tokenizer(str(folder))
    examples = opened(folder, **settings)
    assert len(examples) == stored.num_rows
    for number in range(0, len(examples), 1 if run == "talks" else 8):
        found, expected = (
            examples[number],
            slow_example(stored.read_row(number), tokenizer, stored.manifest, **settings),
        )
        for name in ("input_ids", "labels", "positions", "target_ids", "num_sampled", "source_index"):
            np.testing.assert_array_equal(found[name], expected[name])
        np.testing.assert_array_max_ulp(found["target_weights"], np.array(expected["target_weights"], np.float32), 1)
        for name in ("entropy", "tail_entropy"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
    dtypes = [
        found[name].dtype for name in ("input_ids", "labels", "positions", "target_ids", "target_weights", "entropy")
    ]
    assert dtypes == [np.int64, np.int64, np.int64, np.int32, np.float32, np.float32]


def test_every_turn_is_taught_up_to_its_end(talks, opened):
    _, tokenizer = open_with_tokenizer(str(talks))
    example = opened(talks)[0]
    taught = [tokenizer.decode([token]) if token >= 0 else "·" for token in example["labels"].tolist()]
    runs = [run for run in "".join(taught).split("·") if run]
    assert runs == ["Hello!<|im_end|>", "It is four, of course.<|im_end|>"]


@pytest.mark.parametrize("run", ["talks", "quick_run"])
def test_batches_slices_and_streams_give_the_same_examples(run, opened, request):
    folder = request.getfixturevalue(run)
    examples, streamed = opened(folder), list(opened(folder, streaming=True))
    alone = [examples[i] for i in range(len(examples))]
    order = np.random.default_rng(0).permutation(len(examples)).tolist()
    for i, example in zip(order, examples.__getitems__(order), strict=True):
        assert_same(example, alone[i])
    for one, other in zip(streamed, alone, strict=True):
        assert_same(one, other)


def batches(dataset, workers: int, context: str | None = None) -> list[dict]:
    return list(
        DataLoader(dataset, 16, collate_fn=PackingCollator(), num_workers=workers, multiprocessing_context=context)
    )


def test_workers_give_what_the_process_itself_gives(quick_run, opened):
    examples = opened(quick_run)
    for one, other in zip(batches(examples, 2, "fork"), batches(examples, 0), strict=True):
        assert_same(one, other)
    assert_same(pickle.loads(pickle.dumps(examples))[7], examples[7])  # as another start method sends it


def indices(examples) -> list[int]:
    return [example["source_index"] for example in examples]


def test_workers_share_a_streams_shards(quick_run, opened):
    streamed, examples = opened(quick_run, streaming=True), opened(quick_run)
    loader = DataLoader(streamed, None, num_workers=2, multiprocessing_context="fork")
    by_row = {int(example["source_index"]): example for example in loader}
    assert sorted(by_row) == indices(examples)
    for example in examples:
        assert_same({name: np.asarray(value) for name, value in by_row[example["source_index"]].items()}, example)
    assert_same(next(iter(pickle.loads(pickle.dumps(streamed)))), examples[0])


@pytest.mark.parametrize(("run", "world"), [("quick_run", 2), ("talks", 3)])
@pytest.mark.parametrize("streaming", [False, True])
def test_ranks_read_every_row_once(streaming, run, world, opened, request):
    """60 shards are divided among two ranks; of two, each of three ranks reads all."""
    folder = request.getfixturevalue(run)
    dataset = opened(folder, streaming=streaming).shuffle(seed=3)
    read = [indices(split_dataset_by_node(dataset, rank, world)) for rank in range(world)]
    assert sorted(chain.from_iterable(read)) == indices(opened(folder))
    assert all(read)


RANK = """
import sys
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from chat_logits.training.dataset import training_dataset
dataset = training_dataset("user/logits", streaming=True)
mine = split_dataset_by_node(dataset, int(sys.argv[1]), 2)
print("ROWS", *(int(example["source_index"]) for example in DataLoader(mine, None, num_workers=1)))
"""
WHOLE = """
from chat_logits.training.dataset import training_dataset
dataset = training_dataset("user/logits", revision="main")
print("ROWS", *(example["source_index"] for example in dataset))
"""


def test_ranks_read_every_row_of_the_hub_once(quick_run, opened, tmp_path, tmp_path_factory):
    """Two processes, each with a worker that opened the dataset before it was forked, and one that reads all of it."""
    paths = [quick_run / "extraction.json", quick_run / "shards.json", *shards_in(quick_run)]
    with LoopbackHub() as hub:
        files = {path.relative_to(quick_run).as_posix(): path.read_bytes() for path in paths}
        hub.add_repo("dataset", "user/logits", files=files)
        env = {**hub.environment(tmp_path), "PYTHONPATH": str(REPO)}
        with Server(env, tmp_path_factory.mktemp("server")) as server:
            ranks = [server.start(RANK, rank) for rank in (0, 1)]
            whole = server.run(WHOLE)
            for rank in ranks:
                rank.communicate()
    read = []
    for process in (*ranks, whole):
        assert process.returncode == 0, process.stderr
        (line,) = [line for line in process.stdout.splitlines() if line.startswith("ROWS")]
        read.append([int(word) for word in line.split()[1:]])
    expected = indices(opened(quick_run))
    assert sorted(read[0] + read[1]) == read[2] == expected
    assert min(len(read[0]), len(read[1])) > 50


def test_a_trainer_is_given_a_streams_batches_whole(quick_run, opened, tmp_path):
    """accelerate's dispatching would cut all tensors of a packed batch to a single row."""
    options = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, per_device_train_batch_size=4)
    stream, collate = opened(quick_run, streaming=True), PackingCollator()
    trainer = StudentTrainer(random_model("llama"), options, train_dataset=stream, data_collator=collate)
    assert_same(next(iter(trainer.get_train_dataloader())), collate(list(stream.take(4))))


def test_resumed_within_an_epoch(quick_run, opened):
    """Half-way, from another object: by skipping what was read, and by a stream's own state."""
    undisturbed = list(opened(quick_run).shuffle(seed=5))
    rest = opened(quick_run).shuffle(seed=5).skip(70)
    for one, other in zip(rest, undisturbed[70:], strict=True):
        assert_same(one, other)

    def stream():
        return opened(quick_run, streaming=True).shuffle(
            seed=5, buffer_size=1
        )  # shards; a buffer is not kept in states

    undisturbed, interrupted, resumed = list(stream()), stream(), stream()
    assert indices(undisturbed) != sorted(indices(undisturbed))
    for read, _ in enumerate(interrupted):
        if read == 70:
            break
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    for one, other in zip(resumed, undisturbed[71:], strict=True):
        assert_same(one, other)


def test_long_conversations_are_skipped_and_counted(quick_run, opened, caplog):
    lengths = {example["source_index"]: len(example["input_ids"]) for example in opened(quick_run)}
    most = sorted(lengths.values())[100]
    expected = [index for index, length in lengths.items() if length <= most]
    assert indices(opened(quick_run, max_length=most)) == expected
    assert f"{ROWS - len(expected)} of {ROWS} conversations have more than max_length {most} tokens" in caplog.text
    caplog.clear()
    assert indices(opened(quick_run, max_length=most, streaming=True)) == expected
    told = [record.getMessage() for record in caplog.records]
    first = next(length for length in lengths.values() if length > most)
    assert told[0].startswith("skipped so far: 1 conversations") and told[0].endswith(f"has {first}")
    with pytest.raises(ToolkitError, match=f"{ROWS} of {ROWS} conversations have more than max_length 3 tokens: none"):
        opened(quick_run, max_length=3)


# --- what is refused ---


def rewrite(shard: Path, keep_checksums: bool, **changes) -> None:
    """Change columns of the shard's second row; other writers give no checksums of rows."""
    file = pq.ParquetFile(shard)
    described = json.loads(file.metadata.metadata[METADATA_KEY.encode()])
    if not keep_checksums:
        del described["row_crc32"], described["crc32"]
        described["crc32"] = zlib.crc32(json.dumps(described, sort_keys=True, separators=(",", ":")).encode())
    rows = file.read().to_pylist()
    rows[1].update(changes)
    with pq.ParquetWriter(shard, SCHEMA, store_schema=False) as writer:
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(described)})
        writer.write_table(pa.Table.from_pylist(rows, SCHEMA))


OTHER_WORDS = [
    {"role": "user", "content": "What?", "extra": None},
    {"role": "assistant", "content": "No.", "extra": None},
]
DAMAGES = {
    "another number": (
        True,
        {"logsumexp": [0.0]},
        DamagedShard,
        r"train-00001\.parquet: row 1 is not what was written",
    ),
    "other words": (False, {"messages": OTHER_WORDS}, AlignmentError, "row 3: column alignment_checksum"),
    "too few numbers": (False, {"logsumexp": [0.0]}, ToolkitError, "column logsumexp of row 3: found length 1"),
}


@pytest.mark.parametrize("options", [{}, {"num_proc": 2}, {"streaming": True}], ids=str)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_row_is_named(damage, options, quick_run, opened, tmp_path):
    keep_checksums, changes, error, message = damage
    copy = shutil.copytree(quick_run, tmp_path / "copy")
    rewrite(shards_in(copy)[1], keep_checksums, **changes)
    listing = json.loads((copy / "shards.json").read_text())
    listing["shards"][1]["num_bytes"] = 1 + len(changes)  # another dataset than the one whose rows are in the cache
    del listing["crc32"]
    (copy / "shards.json").write_text(json.dumps(listing))
    with pytest.raises(ToolkitError if "num_proc" in options else error, match=message):
        list(opened(copy, **options))


@pytest.mark.parametrize(("limit", "num_proc"), [(60_000, None), (60_000, 2), (0, None)])  # bytes of a file
def test_a_limit_on_files_is_told_with_the_cache_and_the_room_needed(quick_run, tmp_path, limit, num_proc):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    datasets.disable_progress_bars()  # one that cannot be written keeps the lock of all bars
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(ToolkitError) as refused:
            training_dataset(quick_run, cache_dir=str(tmp_path), num_proc=num_proc)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        datasets.enable_progress_bars()
    told = f"the aligned rows need 7.2 MB in the cache {tmp_path}: a file reached the limit on file sizes (ulimit -f). "
    assert str(refused.value) == told + "Raise it."


def test_without_room_nothing_is_aligned_unless_it_is_already(quick_run, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(dataset, "free_bytes", lambda folder: 7_000_000 * (folder == tmp_path))
    with pytest.raises(
        ToolkitError, match=r"at least 7\.2 MB, .*; 7\.0 MB are free\. .*set HF_DATASETS_CACHE to a fol"
    ):
        training_dataset(quick_run)
    training_dataset(quick_run, streaming=True)
    with monkeypatch.context() as room:
        room.setattr(dataset, "free_bytes", lambda _: 8_000_000)
        training_dataset(quick_run)
    (size,) = (path.stat().st_size for path in tmp_path.rglob("*.arrow"))
    assert 7_150_000 < size < 7_250_000
    training_dataset(quick_run)


@pytest.fixture
def other_tokenizer(quick_model, tmp_path) -> Path:
    """The model's tokenizer with tokens 500 and 501 exchanged."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(quick_model / name, tmp_path / name)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    one, two = (next(piece for piece, i in vocabulary.items() if i == wanted) for wanted in (500, 501))
    vocabulary[one], vocabulary[two] = 501, 500
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def test_another_tokenizer_is_refused_with_the_first_token_that_differs(
    quick_run, quick_model, other_tokenizer, opened
):
    tokens = AutoTokenizer.from_pretrained(quick_model).convert_ids_to_tokens([500, 501])
    message = f"the student's tokenizer has the token {tokens[1]!r} with id 500, the extraction's {tokens[0]!r}"
    for given in (other_tokenizer, AutoTokenizer.from_pretrained(other_tokenizer)):
        with pytest.raises(UsageError) as refused:
            opened(quick_run, given, streaming=True)
        assert message in str(refused.value)


def test_a_tokenizer_with_more_tokens_is_fine_and_one_with_fewer_is_not(quick_run, quick_model, opened):
    own, longer = (AutoTokenizer.from_pretrained(quick_model) for _ in range(2))
    longer.add_tokens(["<extra>"])
    for given in (own, longer, str(quick_model)):
        assert_same(opened(quick_run, given)[0], opened(quick_run)[0])
    with pytest.raises(UsageError, match=r"has no token with id 4096, the extraction's '<extra>'"):
        check_student_tokenizer(own, longer)
    with pytest.raises(UsageError, match="a dict, expected a fast tokenizer"):
        opened(quick_run, {})


def test_settings_that_cannot_be_taught_from_are_refused():
    with pytest.raises(UsageError, match="end_of_turn 'soft': expected one of hard, skip"):
        ExampleMaker(end_of_turn="soft")
    with pytest.raises(UsageError, match=r"hard_weight 1\.5: expected 0 to 1"):
        ExampleMaker(hard_weight=1.5).refuse(64, 16)
    with pytest.raises(UsageError, match="the dataset has no draws from the tail"):
        ExampleMaker().refuse(64, 0)
    ExampleMaker(allow_biased=True).refuse(64, 0)


def test_rows_that_an_older_aligning_code_has_cached_are_aligned_anew(quick_run, tmp_path, monkeypatch):
    def files() -> set[str]:
        examples = training_dataset(quick_run, cache_dir=str(tmp_path))
        return {file["filename"] for file in examples.cache_files}

    before = files()
    assert files() == before
    monkeypatch.setattr(dataset, "ALIGNING_VERSION", dataset.ALIGNING_VERSION + 1)
    assert not files() & before
