"""Thinned rows and datasets against loops over the naive decoder's numbers, and against what is stored."""

import json
import re
import shutil
from dataclasses import replace

import datasets
import numpy as np
import plain_decoder
import pytest
from runs import files_in, rows_in

import explore_logits
import extract_logits
from chat_logits.analysis.thinning import Entries, Setting, thin_entries, thin_row
from chat_logits.analysis.verification import check_rows
from chat_logits.errors import UsageError
from chat_logits.storage.dataset import open_dataset
from chat_logits.storage.manifest import Manifest
from chat_logits.storage.shard import write_shard
from chat_logits.storage.shard_list import read_shard_list, shards_text
from chat_logits.storage.shard_reading import check_shard
from explore_logits import execute_analysis, execute_summary, execute_thinning
from logit_codec import CODE_PROBS, draw_tail, pack_indices, row_entries

STORED = Setting(64, 16, 0.98)
SETTINGS = [Setting(64, 16, 0.9), Setting(16, 8, 0.95), Setting(4, 3, 0.98), Setting(64, 5, 0.98)]
COLUMNS = [
    f"{kind}_{name}" for kind in ("top", "sampled") for name in ("logits_quantized", "indices_low", "indices_high")
]
GRID = 2000


@pytest.fixture(scope="module")
def rows(real_extraction):
    return rows_in(real_extraction)


@pytest.fixture(scope="module")
def thinned(real_extraction, tmp_path_factory):
    """The real rows with K = 16, S = 8 and P = 0.95."""
    folder = tmp_path_factory.mktemp("thinned") / "out"
    execute_thinning(str(real_extraction), (16, 8, 0.95, folder), quiet=True)
    return folder


@pytest.fixture(scope="module")
def some(rows) -> Entries:
    """38 positions from all of the rows."""
    parts = [Entries.of(row) for row in rows]
    names = ("top_ids", "top_codes", "sampled_ids", "sampled_codes")
    return Entries(*(np.concatenate([getattr(part, name) for part in parts])[::50] for name in names))


def repeated(entries: Entries, times: int) -> Entries:
    return Entries(*(np.repeat(values, times, axis=0) for values in vars(entries).values()))


def weights_of(top_ids, top_codes, sampled_ids, sampled_codes) -> dict[int, float]:
    """A position's weights by id, as FORMAT.md reads it."""
    weights = {int(i): plain_decoder.code_probability(c) for i, c in zip(top_ids, top_codes, strict=True) if c}
    share = max(0.0, 1 - sum(weights.values())) / max(1, len(sampled_codes))
    for i, c in zip(sampled_ids, sampled_codes, strict=True):
        if c:
            weights[int(i)] = weights.get(int(i), 0.0) + share
    return weights


def entries_at(entries: Entries, index: int) -> list[np.ndarray]:
    return [values[index] for values in vars(entries).values()]


# --- the tail ---


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_ids_weight_is_the_stored_one_in_the_mean_over_all_uniforms(some, setting):
    """On a grid of uniforms the count of an id is off by less than three of GRID: no chance is in this."""
    uniforms = (np.arange(GRID) + 0.5) / GRID
    found = thin_entries(repeated(some, GRID), setting, STORED.top_p, np.tile(uniforms, len(some.top_ids)))
    for position in range(len(some.top_ids)):
        expected = weights_of(*entries_at(some, position))
        part = slice(position * GRID, (position + 1) * GRID)
        nucleus = CODE_PROBS[found.top_codes[part]]
        share = max(0.0, 1 - nucleus[0].sum()) / setting.num_sampled
        mean = dict(zip(found.top_ids[part][0].tolist(), nucleus[0].tolist(), strict=True))
        drawn, counts = np.unique(found.sampled_ids[part], return_counts=True)
        mean |= dict(zip(drawn.tolist(), (counts * share / GRID).tolist(), strict=True))
        excess = max(0.0, CODE_PROBS[some.top_codes[position]].sum() - 1)
        assert excess < 0.01 and sum(mean.values()) <= 1 + max(1e-9, nucleus[0].sum() - 1)
        for token_id, weight in expected.items():
            assert mean.get(token_id, 0) == pytest.approx(weight, abs=3 * share / GRID + excess)


@pytest.mark.parametrize("setting", SETTINGS)
def test_any_mean_is_unbiased_over_two_thousand_uniforms(some, setting):
    """In 20 random directions, of all positions together, within four standard errors of what is stored."""
    rng = np.random.default_rng(0)
    n, times = len(some.top_ids), 2000
    found = thin_entries(repeated(some, times), setting, STORED.top_p, rng.random(n * times))
    nucleus, kept = CODE_PROBS[found.top_codes], CODE_PROBS[some.top_codes]
    share = np.maximum(0, 1 - nucleus.sum(axis=1)) / setting.num_sampled
    stored_share = np.maximum(0, 1 - kept.sum(axis=1)) / STORED.num_sampled
    excess = np.maximum(0, kept.sum(axis=1) - 1).sum()
    for _ in range(20):
        f = rng.standard_normal(49_152)
        sides = rng.choice([-1, 1], n)
        values = (nucleus * f[found.top_ids]).sum(axis=1) + share * f[found.sampled_ids].sum(axis=1)
        totals = sides @ values.reshape(n, times)
        expected = sides @ ((kept * f[some.top_ids]).sum(axis=1) + stored_share * f[some.sampled_ids].sum(axis=1))
        error = totals.std(ddof=1) / np.sqrt(times)
        assert error > 0 and abs(totals.mean() - expected) < 4 * error + excess * abs(f).max()


def test_fewer_draws_of_an_untouched_nucleus_are_a_fresh_extractions():
    """S' draws of S, a multiple, are those that a uniform of (u + b)/m gives, with b the m-th in which u' falls."""
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.full(300, 0.1))
    kept = np.argsort(-p)[:5]
    for u, other in rng.random((50, 2)):
        draws = draw_tail(p, kept, u, 12)
        codes = np.full((1, 12), 9, np.uint8)
        nucleus = np.array([[200, 100, 90, 80, 70]], np.uint8)
        entries = Entries(kept[None].astype(np.int32), nucleus, draws[None].astype(np.int32), codes)
        found = thin_entries(entries, Setting(5, 4, 0.98), 0.98, np.array([other]))
        assert found.sampled_ids[0].tolist() == draw_tail(p, kept, (u + int(other * 3)) / 3, 4).tolist()


def test_the_rows_of_a_thinned_dataset_are_those_of_loops(thinned, rows):
    """Nuclei, lists in id order and thresholds one by one, with uniforms from Philox's own words."""
    manifest = open_dataset(str(thinned)).manifest
    for row, found in list(zip(rows, rows_in(thinned), strict=True))[::6]:
        words = np.random.Philox(key=[manifest.seed, row["source_index"]], counter=2**192).random_raw(row["num_tokens"])
        for index in range(row["num_tokens"]):
            nucleus, tail = thin_plainly(row, index, STORED, Setting(16, 8, 0.95))
            here = plain_decoder.decode_position(found, index, 16, 8)
            assert here["nucleus"] == nucleus
            u = (int(words[index]) >> 11) * 2**-53
            total = sum(weight for *_, weight in tail)
            picked = [tail[first_above([w for *_, w in tail], (u + j) / 8 * total)] for j in range(8)]
            ids = [i for i, *_ in picked]
            assert entries_at(Entries.of(found), index)[2].tolist() == ids
            assert {i: p for i, (p, _) in here["sampled"].items()} == {i: p for i, p, _ in picked}


def thin_plainly(row: dict, index: int, stored: Setting, setting: Setting) -> tuple[list, list]:
    """What is kept, and the list that the tail is drawn from: (id, probability of its code, weight)."""
    position = plain_decoder.decode_position(row, index, stored.top_k, stored.num_sampled)
    kept, dropped, before = [], [], 0.0
    for rank, (token_id, p) in enumerate(position["nucleus"]):
        if rank < setting.top_k and before < setting.top_p:
            kept.append((token_id, p))
        else:
            dropped.append((token_id, p, p))
        before += p
    draws = [(token_id, p, weight) for token_id, (p, weight) in position["sampled"].items()]
    return kept, sorted(dropped + draws)


def first_above(weights: list[float], threshold: float) -> int:
    total = 0.0
    for i, weight in enumerate(weights):
        total += weight
        if total > threshold:
            return i
    return max(i for i, weight in enumerate(weights) if weight > 0)


def of(top_codes: list[int], sampled: list[tuple[int, int]]) -> Entries:
    """One position: the nucleus' codes, of the ids 1, 2, …, and the draws' ids and codes."""
    ids, codes = np.array(sampled, np.int32).reshape(-1, 2).T
    top_ids = np.arange(1, len(top_codes) + 1)[None].astype(np.int32) * (np.array(top_codes) > 0)
    return Entries(top_ids, np.array([top_codes], np.uint8), ids[None], codes[None].astype(np.uint8))


def test_positions_at_the_edge():
    half = np.array([0.5])
    # A tail that the codes have rounded to nothing: its draws count alike.
    found = thin_entries(of([255], [(7, 1), (8, 1), (9, 1), (9, 1)]), Setting(1, 2, 0.9), 0.9, half)
    assert found.sampled_ids.tolist() == [[8, 9]]
    # Without draws, the entries that were dropped are the tail.
    found = thin_entries(of([200, 150, 100], [(0, 0), (0, 0)]), Setting(1, 2, 0.9), 0.9, half)
    assert set(found.sampled_ids[0].tolist()) <= {2, 3} and (found.sampled_codes[0] > 0).all()
    # Nothing was dropped and nothing drawn.
    found = thin_entries(of([255, 0], [(0, 0), (0, 0)]), Setting(1, 1, 0.9), 0.9, half)
    assert found.top_ids.tolist() == [[1]] and found.sampled_codes.tolist() == found.sampled_ids.tolist() == [[0]]
    # No draw is before the first or past the last.
    for uniform in (0.0, 1 - 2**-53):
        found = thin_entries(of([180, 120, 90], [(50, 3), (60, 4)]), Setting(1, 1, 0.9), 0.9, np.array([uniform]))
        assert found.sampled_ids[0, 0] == (2 if uniform == 0 else 60)


# --- datasets ---


def test_with_all_of_it_kept_the_rows_are_the_same(real_extraction, rows, tmp_path):
    execute_thinning(str(real_extraction), (*STORED, tmp_path / "same"), quiet=True)
    found = rows_in(tmp_path / "same")
    assert found == rows
    manifest = open_dataset(str(real_extraction)).manifest
    for row in rows:
        one = thin_row(row, STORED, manifest)
        assert [bytes(one[name]) if "low" not in name else one[name].tolist() for name in COLUMNS] == [
            row[name] for name in COLUMNS
        ]


def test_the_manifest_says_what_it_is_and_where_from(real_extraction, thinned, tmp_path):
    before = json.loads((real_extraction / "extraction.json").read_text(encoding="utf-8"))
    after = json.loads((thinned / "extraction.json").read_text(encoding="utf-8"))
    first = {"fingerprint": Manifest.from_json(before, "").fingerprint, "top_k": 64, "top_p": 0.98, "num_sampled": 16}
    changed = {"top_k": 16, "num_sampled": 8, "top_p": 0.95, "thinned_from": [first]}
    assert after == before | changed
    card = (thinned / "README.md").read_text(encoding="utf-8")
    assert f"(run\n{first['fingerprint'][:16]})" in card and "the 16 most probable tokens up to" in card
    execute_thinning(str(thinned), (8, 4, 0.9, tmp_path / "again"), quiet=True)
    again = Manifest.read(tmp_path / "again" / "extraction.json", "")
    second = {"fingerprint": Manifest.from_json(after, "").fingerprint, "top_k": 16, "top_p": 0.95, "num_sampled": 8}
    assert (
        again.thinned_from == [first, second]
        and len({again.fingerprint, *(d["fingerprint"] for d in (first, second))}) == 3
    )


@pytest.mark.parametrize(
    "change",
    [{"top_k": 0}, {"top_k": 2**40}, {"top_p": 0}, {"num_sampled": True}, {"fingerprint": 3}, {"more": 1}],
)
def test_an_origin_that_cannot_be_is_refused(thinned, change):
    content = json.loads((thinned / "extraction.json").read_text(encoding="utf-8"))
    content["thinned_from"][0] |= change
    with pytest.raises(Exception, match=r"has thinned_from .*, expected a list of objects with fingerprint, top_k"):
        Manifest.from_json(content, "here")


def test_a_thinned_dataset_is_a_dataset(thinned, rows):
    analysis = execute_analysis(str(thinned), 2, quiet=True)
    assert max(token.kept for token in analysis) <= 16
    summary = execute_summary(str(thinned), quiet=True)
    kept = [thin_plainly(row, i, STORED, Setting(16, 8, 0.95))[0] for row in rows for i in range(row["num_tokens"])]
    assert summary.stored == pytest.approx(np.mean([sum(p for _, p in one) for one in kept]), abs=1e-9)
    assert summary.kept.counts == np.bincount([len(one) for one in kept], minlength=17).tolist()
    assert summary.num_bytes == sum(path.stat().st_size for path in thinned.glob("data/*/*.parquet"))
    assert summary.mean_nll == pytest.approx(-np.concatenate([row["token_log_probs"] for row in rows]).mean())
    loaded = datasets.load_dataset(str(thinned))["train"]
    assert list(loaded) == rows_in(thinned)


def test_a_thinned_dataset_holds_up_against_the_model(thinned, smollm2, tmp_path):
    execute_thinning(str(thinned), (6, 3, 0.9, tmp_path / "again"), quiet=True)
    for folder in (thinned, tmp_path / "again"):
        found = check_rows(open_dataset(str(folder)), *smollm2, [1, 17])
        assert found.causes == []


@pytest.mark.parametrize("column", ["sampled_indices_low", "top_logits_quantized"])
def test_damage_of_a_thinned_dataset_is_found(thinned, smollm2, tmp_path, column):
    """A draw of an id that no uniform gives, and a nucleus that ends too early."""
    folder = shutil.copytree(thinned, tmp_path / "damaged")
    dataset = open_dataset(str(folder))
    changed = list(dataset.rows())[:1]
    if column == "sampled_indices_low":
        entries = Entries.of(changed[0])
        unlikely = next(i for i in range(40_000, 49_000) if i not in entries.top_ids and i not in entries.sampled_ids)
        entries.sampled_ids[3, 2] = unlikely
        low, high = pack_indices(entries.sampled_ids)
        changed[0] |= {column: low, "sampled_indices_high": high}
    else:
        entries = Entries.of(changed[0])
        position = int(((entries.top_codes > 0).sum(axis=1) > 5).argmax())
        is_first = np.arange(16) < np.where(np.arange(len(entries.top_ids)) == position, 4, 16)[:, None]
        cut = replace(entries, top_codes=entries.top_codes * is_first, top_ids=entries.top_ids * is_first)
        changed[0] |= cut.columns()
    entry = write_shard(folder, dataset.manifest, 0, changed, [])
    (folder / "shards.json").write_text(shards_text([entry]), encoding="utf-8")
    (cause,) = check_rows(open_dataset(str(folder)), *smollm2, [0]).causes
    expected = (
        "column sampled_indices_low/high, position 3, entry 2: found id" if "sampled" in column else "a nucleus of 4"
    )
    assert expected in cause


def test_shards_keep_their_rows_and_what_they_skipped(quick_run, tmp_path):
    done = execute_thinning(str(quick_run), (10, 4, 0.9, tmp_path / "deep" / "out"), quiet=True)
    dataset = open_dataset(str(tmp_path / "deep" / "out"))
    before = read_shard_list(quick_run / "shards.json", "").entries
    kept = ("path", "num_rows", "num_tokens", "nll", "skipped", "bad", "turns_left_out")
    assert [[getattr(e, name) for name in kept] for e in dataset.shards] == [
        [getattr(e, name) for name in kept] for e in before
    ]
    unchanged = ("mean_nll", "top1_rate", "max_surprisal")
    for entry in dataset.shards:
        assert check_shard(tmp_path / "deep" / "out", entry.path, dataset.manifest.fingerprint, 3) == entry
    same = ("logsumexp", *unchanged, "token_log_probs", "messages", "tools", "source_index", "alignment_checksum")
    for row, other in zip(dataset.rows(), rows_in(quick_run), strict=True):
        assert [row[name] for name in same] == [other[name] for name in same]
        ids = row_entries(row, "top")[0][:, 0].tolist()
        numbers = plain_decoder.numbers_of_row(row, ids, 10, 4)
        assert row["mean_entropy"] == pytest.approx(numbers["mean_entropy"], rel=1e-6) != other["mean_entropy"]
    assert done.num_bytes == sum(e.num_bytes for e in dataset.shards) < done.num_bytes_before
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_without_draws_none_can_be_made(quick_run, tmp_path, capsys):
    execute_thinning(str(quick_run), (10, 0, 0.98, tmp_path / "none"), quiet=True)
    with pytest.raises(UsageError, match="no draws from the tail, and none can be made from it without bias"):
        execute_thinning(str(tmp_path / "none"), (4, 2, 0.9, tmp_path / "two"))
    execute_thinning(str(tmp_path / "none"), (4, 0, 0.9, tmp_path / "two"))
    assert "K = 4, S = 0, P = 0.9" in capsys.readouterr().out
    assert all(row["sampled_logits_quantized"] == b"" for row in rows_in(tmp_path / "two"))


def test_a_run_does_not_go_on_in_a_thinned_folder(quick_run, flags, tmp_path, capsys):
    execute_thinning(str(quick_run), (*STORED, tmp_path / "out"), quiet=True)
    before = files_in(tmp_path / "out")
    assert extract_logits.main(flags("out")) == 2
    assert re.search(r"holds another run \(thinned_from: ", capsys.readouterr().err)
    assert files_in(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["65", "16", "0.98", "{new}"], "--thin 65 16 0.98: K 65 is more than the 64 that is stored"),
        (["64", "17", "0.98", "{new}"], "--thin 64 17 0.98: S 17 is more than the 16 that is stored"),
        (["64", "16", "0.99", "{new}"], "--thin 64 16 0.99: P 0.99 is more than the 0.98 that is stored"),
        (["0", "8", "0.9", "{new}"], "--thin 0 8 0.9: expected K of 1 or more, S of 0 or more, P above 0 and up to 1"),
        (["8", "8", "nan", "{new}"], "--thin 8 8 nan: expected K of 1 or more"),
        (["8", "8.5", "0.9", "{new}"], "--thin 8 8.5 0.9 {new}: expected K S P FOLDER, such as 16 8 0.95 outputs/thin"),
        (["8", "8", "0.9", ""], "--thin 8 8 0.9 : expected the name of a folder"),
        (["8", "8", "0.9"], "--thin: expected 4 arguments"),
        (["8", "8", "0.9", "{full}"], "--thin {full}: holds files, such as x; expected a new or an empty folder"),
        (["8", "8", "0.9", "{full}/x"], "--thin {full}/x: a file, expected a new or an empty folder"),
        (["8", "8", "0.9", "{new}", "--budget"], "--thin does not go with --budget"),
        (["8", "8", "0.9", "{new}", "--html", "x.html"], "--thin does not go with --html"),
    ],
)
def test_wrong_use_is_refused_in_a_line(quick_run, tmp_path, capsys, words, message):
    places = {"new": tmp_path / "new", "full": tmp_path / "full"}
    places["full"].mkdir()
    (places["full"] / "x").touch()
    assert explore_logits.main([str(quick_run), "--thin", *(word.format(**places) for word in words)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message.format(**places)}") and len(said.splitlines()) == 1
    assert not places["new"].exists()


def test_where_reading_fails_no_folder_is_left(quick_run, tmp_path, capsys):
    folder = shutil.copytree(quick_run, tmp_path / "copy")
    last = sorted(folder.glob("data/*/*.parquet"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    (tmp_path / "empty").mkdir()
    assert explore_logits.main([str(folder), "--thin", "8", "8", "0.9", str(tmp_path / "empty")]) == 1
    assert "damaged Parquet file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "empty"]
    assert not list((tmp_path / "empty").iterdir())
