"""A student over stored rows: against whole distributions of tiny models, and its groups against sums of their own."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PHONE, QUICK_VOCABULARY, WIDE, make_tiny_model
from transformers import AutoModelForCausalLM

import explore_logits
import extract_logits
from chat_logits.analysis.opening import open_with_tokenizer
from chat_logits.analysis.token_classes import TokenClasses
from chat_logits.data.alignment import PROMPT, Alignment
from chat_logits.data.row_alignment import RowAligner
from chat_logits.errors import UsageError
from chat_logits.training import student_pass
from chat_logits.training.student_pass import measure_student
from chat_logits.training.student_report import stored_entropies, turns_and_places
from explore_logits import execute_student

SEEDS = 12
FIGURES = ("by_class", "by_turn", "by_position", "by_entropy")
TALKS = [
    [("user", "Hi"), ("assistant", "Hello, it is 42!"), ("user", "Well?"), ("assistant", "Of course.")],
    [("user", "One more (please)"), ("assistant", "Not now; perhaps tomorrow, at 7 or 8 o'clock.")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"), ("assistant", "f g h")],
]


@pytest.fixture(scope="module")
def student(quick_model, tmp_path_factory) -> Path:
    """The teacher's shape and tokenizer, other weights."""
    folder = make_tiny_model(tmp_path_factory.mktemp("student"), vocab_size=QUICK_VOCABULARY, seed=1)
    shutil.copy(quick_model / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def extracted(quick_model, tmp_path_factory):
    """Extracts the talks anew with these options."""
    place = tmp_path_factory.mktemp("talks")
    rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in TALKS]
    (place / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def extract(name: str, **options) -> Path:
        given = {"model_id": quick_model, "dataset_id": place / "talks.jsonl", "output_dir": place / name}
        given |= {"device": "cpu", **options}
        flags = [str(part) for option, value in given.items() for part in (f"--{option}", value)]
        assert extract_logits.main(flags) == 0
        return place / name

    return extract


def loaded(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def dense(folder: Path, teacher, student) -> list[dict]:
    """Of each row's extracted positions, from whole distributions: exact KL, whether the first tokens agree."""
    dataset, tokenizer = open_with_tokenizer(str(folder))
    aligner, found = RowAligner(tokenizer, dataset.manifest), []
    for row in dataset.rows():
        alignment = aligner.align(row)
        with torch.no_grad():
            log_p, log_q = (
                model(torch.from_numpy(alignment.input_ids)[None]).logits[0, alignment.positions - 1].double()
                for model in (teacher, student)
            )
        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
        found.append({"kl": kl, "agrees": (log_p.argmax(-1) == log_q.argmax(-1)).numpy(), "alignment": alignment})
    return found


@pytest.fixture(scope="module")
def models(quick_model, student):
    return loaded(quick_model), loaded(student)


def test_where_all_is_stored_it_is_the_exact_kl(extracted, models):
    """K is the vocabulary: nothing is left to draw but the codes' rounding."""
    folder = extracted("whole", top_k=QUICK_VOCABULARY, top_p=1.0, num_sampled=1)
    dataset, tokenizer = open_with_tokenizer(str(folder))
    report, exact = measure_student(dataset, models[1], tokenizer), dense(folder, *models)
    kl = np.concatenate([row["kl"] for row in exact])
    assert report.whole.positions == len(kl)
    assert report.whole.kl == pytest.approx(kl.mean(), rel=5e-3)
    assert report.whole.agreement == pytest.approx(np.concatenate([row["agrees"] for row in exact]).mean())
    assert abs(report.whole.kl_tail) < 0.02 * report.whole.kl
    own = measure_student(dataset, models[0], tokenizer).whole
    assert abs(own.kl) < 5e-3 and own.agreement == 1.0


def test_over_many_draws_the_mean_is_the_exact_kl(extracted, models):
    """Within 4 standard errors over the seeds, and the codes' rounding; the tail's part is not all of it."""
    found = []
    for seed in range(SEEDS):
        folder = extracted(f"seed{seed}", top_k=8, num_sampled=4, seed=seed)
        dataset, tokenizer = open_with_tokenizer(str(folder))
        found.append(measure_student(dataset, models[1], tokenizer).whole)
    exact = np.concatenate([row["kl"] for row in dense(folder, *models)]).mean()
    kl = np.array([one.kl for one in found])
    assert kl.std() > 0 and abs(kl.mean() - exact) < 4 * kl.std(ddof=1) / math.sqrt(SEEDS) + 0.01 * exact
    assert all(0 < one.kl_tail < one.kl for one in found)


@pytest.fixture(scope="module")
def report(extracted, models):
    dataset, tokenizer = open_with_tokenizer(str(extracted("one", top_k=8, num_sampled=4)))
    return measure_student(dataset, models[1], tokenizer)


def test_groups_add_up_to_the_whole(report):
    whole = report.whole
    for name in FIGURES:
        groups = getattr(report, name)
        assert sum(group.positions for group in groups) == whole.positions
        for figure in ("kl", "kl_tail", "agreement"):
            total = sum(group.positions * getattr(group, figure) for group in groups)
            assert total == pytest.approx(whole.positions * getattr(whole, figure))
        assert sum(group.share for group in groups) == pytest.approx(1)
    assert sum(each.positions * each.kl for each in report.worst) == pytest.approx(whole.positions * whole.kl)
    assert [each.kl for each in report.worst] == sorted((each.kl for each in report.worst), reverse=True)
    assert report.ends_left_out == 6 and [group.name for group in report.by_turn] == ["1", "2", "3 – 4"]
    assert [group.conversations for group in report.by_turn] == [3, 2, 1]
    assert math.isnan(report.by_turn[2].error) and report.by_turn[0].error > 0


def test_each_group_is_what_its_positions_are(extracted, models, monkeypatch):
    """From the values of single positions, grouped here; batches of one conversation give the same."""
    dataset, tokenizer = open_with_tokenizer(str(extracted("again", top_k=8, num_sampled=4)))
    values = {}
    add = student_pass.StudentTally.add

    def noted(self, index, row, alignment, of_row):
        values[index] = of_row, row, alignment
        add(self, index, row, alignment, of_row)

    monkeypatch.setattr(student_pass.StudentTally, "add", noted)
    report = measure_student(dataset, models[1], tokenizer)
    monkeypatch.setattr(student_pass, "BATCH_TOKENS", 1)
    alone = measure_student(dataset, models[1], tokenizer)
    assert alone.whole.kl == pytest.approx(report.whole.kl, rel=1e-5)
    classes = TokenClasses(tokenizer)
    sums: dict = {}
    for of_row, row, alignment in values.values():
        kinds = classes.of(alignment.input_ids, alignment.positions)
        for kind in set(kinds):
            chosen = of_row[[one == kind for one in kinds]].sum(axis=0)
            sums.setdefault(kind, []).append(chosen)
        assert (stored_entropies(row) >= 0).all()
    assert {group.name for group in report.by_class} == set(sums)
    for group in report.by_class:
        counts, kl, tail, agreeing = np.array(sums[group.name]).T
        mean, n = kl.sum() / counts.sum(), len(counts)
        assert (group.conversations, group.positions) == (n, counts.sum())
        assert (group.kl, group.kl_tail, group.agreement) == pytest.approx(
            (mean, tail.sum() / counts.sum(), agreeing.sum() / counts.sum())
        )
        if n > 1:
            spread = ((kl - mean * counts) ** 2).sum() * n / (n - 1)
            assert group.error == pytest.approx(math.sqrt(spread) / counts.sum(), rel=1e-6, abs=1e-9)


def test_turns_and_places_by_hand():
    reasons = [
        PROMPT,
        PROMPT,
        None,
        None,
        "special token",
        PROMPT,
        "marked not to be trained on",
        PROMPT,
        None,
        "x",
        None,
    ]
    turns, places = turns_and_places(Alignment(np.arange(len(reasons)), reasons))
    assert (turns.tolist(), places.tolist()) == ([1, 1, 3, 3], [1, 2, 1, 2])


def test_ends_that_were_extracted_are_in_it(extracted, models):
    folder = extracted("ends", top_k=8, num_sampled=4)
    kept = open_with_tokenizer(str(folder))
    assert measure_student(*_with(kept, models[1])).ends_left_out == 6
    given = ["--model_id", kept[0].manifest.model_id, "--dataset_id", str(folder.parent / "talks.jsonl")]
    given += ["--output_dir", str(folder.parent / "kept"), "--device", "cpu", "--top_k", "8", "--num_sampled", "4"]
    assert extract_logits.main([*given, "--keep_end_of_turn"]) == 0
    report = measure_student(*_with(open_with_tokenizer(str(folder.parent / "kept")), models[1]))
    assert report.ends_left_out == 0
    (special,) = [group for group in report.by_class if group.name == "special token"]
    assert special.positions == 6


def _with(opened, student):
    return opened[0], student, opened[1]


# --- the command ---


def test_the_command_gives_all_three_forms(quick_run, student, tmp_path, capsys, opened):
    files = ["--html", str(tmp_path / "page.html"), "--json", str(tmp_path / "found.json")]
    assert explore_logits.main([str(quick_run), "--student", str(student), "--student_rows", "10", *files]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["whole"]["conversations"] == 10 and f"{found['whole']['kl']:.4f} ±" in printed
    assert "10 of 160 conversations" in printed and "Left out: 10 ends of turns" in printed
    report = execute_student(str(quick_run), student, student_rows=10, quiet=True)
    assert json.loads(report.to_json()) == {**found, "student_id": str(student)}
    for viewport, scheme in ((WIDE, "light"), (PHONE, "dark")):
        page = opened(report, viewport, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        widths = (
            page.locator(".groups")
            .first.locator(".track")
            .evaluate_all(
                "all => all.map(one => [...one.children].reduce((sum, i) => sum + i.getBoundingClientRect().width, 0))"
            )
        )
        largest = max(group.kl for group in report.by_class)
        assert widths == pytest.approx([group.kl / largest * max(widths) for group in report.by_class], abs=1)
        assert f"{report.whole.kl:.4f}" in page.locator(".tiles").inner_text() and not page.complaints


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--student", "x", "--summary"], "--student does not go with --summary"),
        (["--budget", "--student", "x"], "--budget does not go with --student"),
        (["--student_rows", "3"], "--student_rows is for --student"),
        (["--student_revision", "x"], "--student_revision is for --student"),
    ],
)
def test_wrong_use_ends_in_a_line(quick_run, capsys, options, words):
    assert explore_logits.main([str(quick_run), *options]) == 2
    assert words in capsys.readouterr().err


def test_a_missing_student_and_another_tokenizer_are_told(quick_run, student, tmp_path, capsys):
    assert explore_logits.main([str(quick_run), "--student", str(tmp_path / "gone")]) != 0
    told = capsys.readouterr().err
    assert "gone" in told and "Traceback" not in told
    other = shutil.copytree(student, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    one, two = (next(piece for piece, i in vocabulary.items() if i == wanted) for wanted in (500, 501))
    vocabulary[one], vocabulary[two] = 501, 500
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert explore_logits.main([str(quick_run), "--student", str(other)]) == 2
    assert "the student's tokenizer has the token" in capsys.readouterr().err


def test_rows_without_draws_are_refused(extracted, models):
    dataset, tokenizer = open_with_tokenizer(str(extracted("none", top_k=8, num_sampled=0)))
    with pytest.raises(UsageError, match=r"no draws from the tail .*cannot be compared with"):
        measure_student(dataset, models[1], tokenizer)
