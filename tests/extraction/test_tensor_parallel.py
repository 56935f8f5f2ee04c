"""`--tensor_parallel`: runs whose model several processes compute, what ends them, and what is refused."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import CONVERSATIONS, MODEL, TEMPLATE, run_command
from lives import Life
from ray_runs import followers_of, is_running
from runs import SHARDS, assert_alike, files_in, rows_in, shards_in

import explore_logits
import extract_logits
from chat_logits.errors import UsageError
from chat_logits.extraction.config import ExtractConfig
from chat_logits.model.parts import choose_split

SPLIT = 5e-5  # nats: what sums in parts change in float32 log-probabilities of about 10


def wait_until(condition, life: Life | None = None) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert life is None or life.is_alive(), life.said
        assert time.monotonic() < until, life.said if life else "too long"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def in_two(quick_model, calm_source, tmp_path_factory) -> Path:
    """The folder of the run with 2 processes, which nothing disturbed."""
    import runs

    out = tmp_path_factory.mktemp("in_two") / "out"
    assert extract_logits.main([*runs.flags_for(quick_model, calm_source, out), "--tensor_parallel", "2"]) == 0
    assert not followers_of(os.getpid())
    return out


def test_two_processes_store_what_one_stores(in_two, quick_run):
    assert_alike(rows_in(in_two), rows_in(quick_run), SPLIT)
    recorded, alone = (json.loads((folder / "extraction.json").read_text()) for folder in (in_two, quick_run))
    assert recorded.pop("tensor_parallel") == 2
    assert {**recorded, "batch_logit_rows": 0} == {**alone, "batch_logit_rows": 0}


def slow() -> None:
    """In the first process: it is late in each batch, in which the other waits for it, so that a run lasts."""
    from chat_logits.model import teacher

    def late(*part, select=teacher.select_in_parts):
        time.sleep(0.2)
        return select(*part)

    teacher.select_in_parts = late


def test_whatever_ends_a_process_nothing_is_lost_and_nothing_is_left_running(flags, in_two, tmp_path):
    """A follower killed in mid-shard, the first process killed, Ctrl-C; and then the run goes on to its end.

    That the run has 2 processes is known from its record, but for the first start.
    """
    out, followers = tmp_path / "out", []

    def start(name: str, *more) -> tuple[Life, int]:
        before = len(shards_in(out))
        life = Life(flags("out", *more), tmp_path / f"{name}.log", slow)
        wait_until(lambda: len(shards_in(out)) > before + 1, life)
        (follower,) = followers_of(life.pid)
        followers.append(follower)
        return life, follower

    life, follower = start("follower", "--tensor_parallel", "2")
    os.kill(follower, signal.SIGKILL)
    killed = time.monotonic()
    assert life.wait() == 1
    assert time.monotonic() - killed < 60
    assert "error: process 2 of 2 was ended by SIGKILL, as the system does where memory is short." in life.said
    assert "the same command resumes" in life.said and "Traceback" not in life.said

    life, follower = start("first")
    assert "taken from the resumed run: --tensor_parallel 2" in life.said
    life.kill()
    assert life.wait() == -signal.SIGKILL
    wait_until(lambda: not is_running(follower))

    life, follower = start("interrupted")
    life.kill(signal.SIGINT)
    assert life.wait() == 128 + signal.SIGINT
    assert "finished shards are in" in life.said and "rror" not in life.said
    assert len(shards_in(out)) < SHARDS

    last = Life(flags("out"), tmp_path / "last.log")
    assert last.wait() == 0, last.said
    assert not any(is_running(pid) for pid in followers)
    assert files_in(out) == files_in(in_two)


def test_a_run_goes_on_with_another_number_of_processes_if_that_is_asked_for(flags, in_two, tmp_path):
    shutil.copytree(in_two, tmp_path / "out")
    for shard in shards_in(tmp_path / "out")[-2:]:
        shard.unlink()
    assert extract_logits.main(flags("out", "--tensor_parallel", "1")) == 0
    assert_alike(rows_in(tmp_path / "out"), rows_in(in_two), SPLIT)


def test_quantization_newly_given_is_what_a_resumed_run_is_refused_for(flags, in_two, tmp_path, capsys):
    shutil.copytree(in_two, tmp_path / "out")
    assert extract_logits.main(flags("out", "--quantization", "bitsandbytes-8bit")) == 2
    (refusal,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "quantization" in refusal and "parallel" not in refusal


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_map": "auto"}, "`device_map` spreads whole layers"),
        ({"quantization": "torchao-int8"}, "`quantization` torchao-int8 cannot be done in parts"),
        ({"gguf_file": "model.gguf"}, "cannot be read in parts"),
        ({"device": "cuda:1"}, "`device` cuda:1 is one"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        ExtractConfig(model_id="m", dataset_id="d", output_dir="o", tensor_parallel=2, **options)


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("gpt2", {}, "model type gpt2: transformers has no plan for its layers; `device_map` auto"),
        ("gpt_oss", {"num_local_experts": 3}, "model type gpt_oss: transformers has no plan for its layers"),
        (
            "mixtral",
            {"num_local_experts": 3, "intermediate_size": 31},
            r"layers.\*.mlp.experts.gate_up_proj \[3, 62, 32\] does not divide by 2",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(model_type, changes, said):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    config = AutoConfig.for_model(model_type, **sizes, num_key_value_heads=4, pad_token_id=0, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UsageError, match=said):
        choose_split(model, 2)


@pytest.fixture(scope="module")
def real_in_two(tmp_path_factory) -> Path:
    """SmolLM2 with 2 processes, as a user types it: its 9 heads do not divide."""
    out = tmp_path_factory.mktemp("real") / "out"
    done = run_command(
        "extract_logits.py",
        *("--model_id", MODEL, "--dataset_id", CONVERSATIONS, "--chat_template", TEMPLATE),
        *("--max_samples", 32, "--output_dir", out, "--tensor_parallel", 2),
    )
    assert done.returncode == 0, done.stderr
    assert "9 num_attention_heads and 3 num_key_value_heads do not divide by 2" in done.stderr
    return out


def test_a_real_models_rows_are_those_of_one_process(real_in_two, real_extraction):
    found, expected = rows_in(real_in_two), rows_in(real_extraction)
    assert len(found) == 32
    for row, other in zip(found, expected, strict=True):
        assert np.abs(np.subtract(row["token_log_probs"], other["token_log_probs"])).max() < 1e-4
        assert np.abs(np.subtract(row["logsumexp"], other["logsumexp"])).max() < 1e-4


def test_one_process_verifies_what_two_stored(real_in_two, tmp_path):
    found = tmp_path / "found.json"
    assert explore_logits.main([str(real_in_two), "--verify", "32", "--json", str(found)]) == 0
    verified = json.loads(found.read_text())
    assert verified["holds"] and verified["num_rows"] == 32
    assert verified["figures"]["kl_mean"] <= 2.5e-4
    assert verified["figures"]["token_log_probs"] < 1e-4
