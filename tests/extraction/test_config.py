"""What a run may be asked for: each option's default, help and range, from Python and from a config file."""

import dataclasses
import pickle
from datetime import date
from pathlib import Path

import pytest

from chat_logits.cli.config_file import COMMAND_LINE_ALONE, read_config_file
from chat_logits.cli.extract_options import ExtractOptions
from chat_logits.errors import UsageError
from chat_logits.extraction.config import ExtractConfig
from chat_logits.options import options_of
from chat_logits.training.config import TrainConfig

PLACES = {"model_id": "user/model", "dataset_id": "chats.jsonl"}
DEFAULTS = {
    **dict.fromkeys(("model_revision", "gguf_file", "batch_tokens", "logit_memory", "device", "device_map")),
    **dict.fromkeys(
        ("max_memory", "attn_implementation", "head_dtype", "dataset_config", "dataset_revision", "messages_column")
    ),
    **dict.fromkeys(("prompt_column", "response_column", "system_prompt", "max_samples", "max_length")),
    **dict.fromkeys(("tools_column", "chat_template", "output_repo", "output_revision", "output_dir", "ray_address")),
    **dict.fromkeys(("num_cpu_workers", "quantization", "rows_per_shard")),
    **dict.fromkeys(("all_turns", "keep_end_of_turn", "trust_remote_code", "streaming", "private"), False),
    **dict.fromkeys(("overwrite", "check_shards"), False),
    **{"prefix_cache": True, "dtype": "auto", "split": "train", "template_kwargs": {}, "skip_tokens": ()},
    **{"keep_tokens": (), "top_k": 64, "top_p": 0.98, "num_sampled": 16, "seed": 0, "push_every": 300.0},
    **{"max_bad_rows": 0.01, "tensor_parallel": 1, "num_workers": 1, "gpus_per_worker": 1, "part": None},
}
# An option, a value that is no longer in its range, the nearest that is, and the range in words.
EDGES = [
    ("top_k", 0, 1, "expected 1 or more"),
    ("top_p", 0, 0.001, "expected a number above 0 and up to 1"),
    ("top_p", 1.001, 1, "expected a number above 0 and up to 1"),
    ("top_p", float("nan"), 0.5, "expected a number above 0 and up to 1"),
    ("num_sampled", -1, 0, "expected 0 or more"),
    ("seed", -1, 0, "expected 0 to 9223372036854775807"),
    ("seed", 2**63, 2**63 - 1, "expected 0 to 9223372036854775807"),
    ("rows_per_shard", 0, 1, "expected 1 to 16777216"),
    ("push_every", -0.1, 0, "expected 0 or more"),
    ("max_bad_rows", -0.1, 0, "expected 0 or more"),
    ("max_samples", 0, 1, "expected 1 or more"),
    ("max_length", 1, 2, "expected 2 or more"),
    ("batch_tokens", 0, 1, "expected 1 or more"),
    ("logit_memory", 0, 1, "expected 1 or more"),
    ("num_workers", 0, 1, "expected 1 or more"),
    ("num_cpu_workers", 0, 1, "expected 1 or more"),
    ("gpus_per_worker", 0, 1, "expected 1 or more"),
    ("tensor_parallel", 0, 1, "expected 1 or more"),
    ("dtype", "float8", "float16", "expected one of auto, float32, bfloat16, float16"),
    ("head_dtype", "float16", "model", "expected one of float32, model"),
    ("device_map", "even", "auto", "expected one of auto, balanced, sequential"),
    ("output_repo", "user/", "user/name", "expected USER/NAME"),
    ("ray_address", "ray://here:1", "here:1", "without ray://"),
    ("ray_address", "here:65536", "auto", "expected HOST:PORT or auto"),
    ("part", "4/3", "3/3", "expected I/N, part I of N"),
    ("template_kwargs", {"messages": []}, {"tools": []}, "expected a JSON object without"),
]


def test_every_option_has_its_default_and_a_help():
    config = ExtractConfig(**PLACES)
    assert dataclasses.asdict(config) == {**PLACES, **DEFAULTS}
    for one in options_of(ExtractConfig).values():
        assert one.help and one.group and (one.kind is bool or one.metavar or one.choices)


@pytest.mark.parametrize(("name", "beyond", "within", "words"), EDGES)
def test_a_value_beyond_its_range_is_named_with_the_range(name, beyond, within, words):
    assert getattr(ExtractConfig(**PLACES, **{name: within}), name) == within
    with pytest.raises(UsageError, match=f"^`{name}`") as refused:
        ExtractConfig(**PLACES, **{name: beyond})
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("top_k", "8", "'8': expected a whole number, 1 or more"),
        ("top_k", 8.0, "8.0: expected a whole number"),
        ("top_k", True, "True: expected a whole number"),
        ("top_k", None, "None: expected a whole number"),
        ("top_p", "all", "'all': expected a number"),
        ("streaming", 1, "1: expected true or false"),
        ("split", 1, "1: expected text"),
        ("skip_tokens", "<eos>", "'<eos>': expected a list of texts"),
        ("keep_tokens", [1], "[1]: expected a list of texts"),
        ("max_bad_rows", 1.5, "1.5: expected a share below 1, or a whole number"),
        ("template_kwargs", {"d": {"on": date(2024, 7, 26)}}, ": d: Object of type date is not JSON serializable"),
        ("template_kwargs", [], "[]: expected a JSON object"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, words):
    with pytest.raises(UsageError) as refused:
        ExtractConfig(**PLACES, **{name: value})
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cuda", "device_map": "auto"}, "`device` cuda: `device_map` chooses the devices"),
        ({"device": "cuda", "num_workers": 2}, "each worker gets its own accelerator"),
        ({"gpus_per_worker": 2, "device_map": "auto"}, "`gpus_per_worker` 2: it goes with `num_workers`"),
        ({"max_memory": {"cpu": "1GiB"}}, "`max_memory`: it goes with `device_map`"),
        ({"model_id": "some/file.gguf"}, "`gguf_file` file.gguf"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(UsageError) as refused:
        ExtractConfig(**{**PLACES, **options})
    assert words in str(refused.value)


def test_where_shards_go_is_the_configs_to_say():
    def config(**options):
        return ExtractConfig(**PLACES, **options)

    assert config(output_repo="user/name").folder == Path("outputs/name")
    assert config(output_repo="user/name", output_dir="there").folder == Path("there")
    with pytest.raises(UsageError, match="nowhere to write"):
        _ = config().folder
    assert not config(num_workers=2, output_repo="user/name").uploads_without_folder
    cluster = config(ray_address="auto", output_repo="user/name")
    assert cluster.uses_ray and cluster.uploads_without_folder
    assert not config(ray_address="auto", output_dir="shared").uploads_without_folder
    assert config(num_workers=2).uses_ray and not config().uses_ray


def test_its_text_repeats_it_and_workers_get_the_same():
    config = ExtractConfig(**PLACES, top_k=8, skip_tokens=["a", "b"], template_kwargs={"tools": []}, prefix_cache=False)
    assert eval(repr(config)) == config == pickle.loads(pickle.dumps(config))
    assert "seed" not in repr(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 9


def test_paths_may_be_given_as_such():
    assert ExtractConfig(**PLACES, output_dir=Path("a/b")).output_dir == "a/b"


# --- config files ---


def write(tmp_path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_has_the_same_names_and_types(tmp_path):
    text = (
        "# a run\nmodel_id: user/model\ndataset_id: chats.jsonl\ntop_p: 1\nseed: 7\nstreaming: true\nprefix_cache: no\n"
        'skip_tokens: ["<a>", "<b>"]\nmax_memory: {0: 60GiB, cpu: 200GiB}\ndevice_map: auto\nmax_samples: null\n'
        "chat_template: |\n  {% for m in messages %}\n  {% endfor %}\n"
    )
    entries = read_config_file(write(tmp_path, text), ExtractConfig)
    assert ExtractConfig(**{name: one.value for name, one in entries.items()}) == ExtractConfig(
        **PLACES,
        top_p=1.0,
        seed=7,
        streaming=True,
        prefix_cache=False,
        skip_tokens=("<a>", "<b>"),
        max_memory={"0": "60GiB", "cpu": "200GiB"},
        device_map="auto",
        chat_template="{% for m in messages %}\n{% endfor %}\n",
    )
    assert read_config_file(write(tmp_path, text.replace("max_samples", "max-samples")), ExtractConfig) == entries
    assert entries["seed"].line == 5 and entries["chat_template"].line == 12


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\n\ntop-kk: 3\n", "line 3: top-kk: no such option; did you mean top_k?"),
        ("something: 3\n", "line 1: something: no such option"),
        ("seed: 1\ntop_k: many\n", "line 2: top_k 'many': expected a whole number, 1 or more"),
        ("seed: 1\ntop_p:\n  3\n", "line 2: top_p 3.0: expected a number above 0 and up to 1"),
        ("top_k: 0\n", "line 1: top_k 0: expected 1 or more"),
        ("split: 2024\n", "line 1: split 2024: expected text"),
        ("seed: 1\nseed: 2\n", "line 2: seed is in line 1 already"),
        ("- seed\n", "line 1: expected lines such as top_k: 64"),
        ("seed: 1\n  top_k: [\n", "line 2: not YAML"),
        ("seed: !!python/object:os.system 1\n", "line 1: seed: could not determine a constructor"),
        ("seed: \x00\n", "not YAML"),
        ("gguf_file: 2024-13-45\n", "line 1: gguf_file"),
        ("preview: 3\n", "line 1: preview: for the command line only; give it there, as --preview"),
        ("log-level: debug\n", "line 1: log-level: for the command line only; give it there, as --log_level"),
        ("top_p: yes\n", "line 1: top_p True: expected a number"),
        ("top_p: nan\n", "line 1: top_p nan: expected a number above 0 and up to 1"),
        ("top_p: 1e\n", "line 1: top_p '1e': expected a number"),
        ("top_k: 1e1\n", "line 1: top_k '1e1': expected a whole number, 1 or more"),
        ("top_k: 8.0\n", "line 1: top_k 8.0: expected a whole number, 1 or more"),
        ("streaming: 'true'\n", "line 1: streaming 'true': expected true or false"),
        ("template_kwargs: '{}'\n", "line 1: template_kwargs '{}': expected a JSON object"),
        (
            "seed: 1\ntemplate_kwargs: {date_string: 2024-07-26}\n",
            "line 2: template_kwargs: date_string: Object of type date is not JSON serializable, expected what JSON "
            "has; in YAML, a date is text in quotes",
        ),
        ("template_kwargs: {a: [.nan]}\n", "line 1: template_kwargs: a: Out of range float values"),
        ("top_k: 3\ntop-k: 3\n", "line 2: top_k is in line 1 already"),
    ],
)
def test_mistakes_in_a_file_are_told_with_key_line_and_what_was_expected(tmp_path, text, words):
    with pytest.raises(UsageError) as refused:
        read_config_file(write(tmp_path, text), ExtractConfig)
    assert "run.yaml" in str(refused.value) and words in str(refused.value)


def test_numbers_that_yaml_takes_for_texts_are_numbers(tmp_path):
    text = 'top_p: 1e-1\npush_every: 2E1\nmax_bad_rows: "0.5"\ntop_k: "8"\nseed: 08\n'
    read = {name: one.value for name, one in read_config_file(write(tmp_path, text), ExtractConfig).items()}
    assert read == {"top_p": 0.1, "push_every": 20.0, "max_bad_rows": 0.5, "top_k": 8, "seed": 8}
    assert [type(value) for value in read.values()] == [float] * 3 + [int] * 2


def test_every_option_that_is_no_part_of_a_run_is_for_the_command_line_alone():
    assert set(options_of(ExtractOptions)) == COMMAND_LINE_ALONE


def test_a_file_that_is_missing_or_no_text_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"missing\.yaml: No such file or directory; expected a YAML file"):
        read_config_file(str(tmp_path / "missing.yaml"), ExtractConfig)
    with pytest.raises(UsageError, match="Is a directory"):
        read_config_file(str(tmp_path), ExtractConfig)
    (tmp_path / "latin.yaml").write_bytes(b"split: \xe4")
    with pytest.raises(UsageError, match="expected UTF-8 text"):
        read_config_file(str(tmp_path / "latin.yaml"), ExtractConfig)
    assert read_config_file(write(tmp_path, "# nothing\n"), ExtractConfig) == {}


def test_a_home_folder_that_no_shell_has_put_in_is_put_in(tmp_path, monkeypatch):
    """As in a config file, or after an equals sign: else some libraries would write there, and others to "./~"."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ExtractConfig(model_id="~/model", dataset_id="~/chats.jsonl", output_dir="~", system_prompt="~/no place")
    assert config.model_id == f"{tmp_path}/model" and config.dataset_id == f"{tmp_path}/chats.jsonl"
    assert config.folder == tmp_path and config.system_prompt == "~/no place"
    training = TrainConfig(logit_dataset_id="~/rows", student_id="a/b", output_dir="~/student")
    assert training.logit_dataset_id == f"{tmp_path}/rows" and training.output_dir == f"{tmp_path}/student"
    with pytest.raises(UsageError, match="`output_dir` ~nobody-has-this-name/x: no such user"):
        ExtractConfig(model_id="m", dataset_id="d", output_dir="~nobody-has-this-name/x")
