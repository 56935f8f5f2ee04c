"""Runs without a template, over several turns, with the sets and shapes of data that people have."""

import json

import pytest
import torch
import yaml
from conftest import CONVERSATIONS, MODEL, TEMPLATE, make_tiny_model
from runs import assert_alike, rows_in

import extract_logits
from chat_logits.analysis.tokens import EXTRACTED, SKIPPED
from chat_logits.data.row_alignment import align_row
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.storage.dataset import open_dataset
from demo.fetch import package_files
from explore_logits import execute_analysis

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]


@pytest.fixture
def extract(small_model, tmp_path):
    """Run the command in this process, without a template unless one is given."""

    def run(dataset_id, *flags, out="out", model_id=small_model, **options):
        pairs = {"model_id": model_id, "dataset_id": dataset_id, "output_dir": tmp_path / out, **options}
        arguments = [str(part) for name, value in pairs.items() for part in (f"--{name}", value)]
        return extract_logits.main([*arguments, "--device", "cpu", *map(str, flags)])

    return run


def test_smollm2_needs_no_template(extract, tmp_path, capsys):
    """The same shard, byte for byte but for the fingerprint's own record, as with the shipped template."""
    for out, options in (("own", {}), ("shipped", {"chat_template": TEMPLATE})):
        assert extract(CONVERSATIONS, model_id=MODEL, out=out, max_samples=8, **options) == 0
    assert "Assistant tokens: shipped template smollm2.jinja" in capsys.readouterr().err
    own, shipped = (next((tmp_path / out).glob("data/*/*.parquet")).read_bytes() for out in ("own", "shipped"))
    assert own == shipped
    assert open_dataset(str(tmp_path / "own")).manifest.mask_source == "shipped template smollm2.jinja"


def test_prefixes_give_the_same_rows_too(extract, tmp_path, chat_file, capsys):
    """A template that no shipped one equals: spans come from prefixes, and exploration repeats them."""
    unlike = load_tokenizer(str(MODEL)).chat_template.replace("named SmolLM", "called SmolLM")
    marked = TEMPLATE.read_text(encoding="utf-8").replace("named SmolLM", "called SmolLM")
    source = chat_file([{"messages": CHAT * 3}, {"messages": CHAT}])
    for out, template in (("prefixes", unlike), ("marked", marked)):
        assert extract(source, out=out, chat_template=template) == 0
    assert "Assistant tokens: prefixes of each conversation" in capsys.readouterr().err
    assert rows_in(tmp_path / "prefixes") == rows_in(tmp_path / "marked")
    tokens = execute_analysis(str(tmp_path / "prefixes"), 0)
    assert "".join(token.text for token in tokens if token.status == EXTRACTED) == "Hello there" * 3


def corpus() -> list[list[str]]:
    """Conversations of at least three turns each way from the ChatterBot corpus."""
    (path,) = [
        path for path in package_files("chatterbot-corpus", "conversations.yml") if path.parent.name == "english"
    ]
    found = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
    return [[str(turn) for turn in turns] for turns in found if len(turns) >= 6][:8]


def test_conversations_of_several_turns(extract, tmp_path, chat_file, smollm2):
    """Real dialogues, through extraction and back: each turn's tokens in place, each number a plain forward's."""
    dialogues = corpus()
    assert len(dialogues) >= 4
    roles = ("user", "assistant")
    chats = [[{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)] for turns in dialogues]
    assert extract(chat_file([{"messages": chat} for chat in chats]), model_id=MODEL) == 0
    for index, turns in enumerate(dialogues):
        tokens = execute_analysis(str(tmp_path / "out"), index)
        assert answers_of(tokens) == turns[1::2]
        with torch.inference_mode():
            logits = smollm2[0](torch.tensor([[token.token_id for token in tokens]])).logits[0].double()
        log_probs = logits.log_softmax(-1).numpy()
        for token in tokens:
            if token.status == EXTRACTED:
                assert token.log_prob == pytest.approx(log_probs[token.position - 1, token.token_id], abs=1e-4)


def answers_of(tokens) -> list[str]:
    """The extracted text of each turn: runs of extracted tokens, each ended by a skipped end-of-turn token."""
    answers, text = [], ""
    for token in tokens:
        if token.status == EXTRACTED:
            text += token.text
        elif token.status == SKIPPED:
            assert token.text == "<|im_end|>"
            answers.append(text)
            text = ""
    return answers


def test_a_preview_runs_no_model_and_writes_nothing(extract, chat_file, tmp_path, capsys, monkeypatch):
    from chat_logits.model import loading

    monkeypatch.setattr(loading, "load_model", None)  # would raise
    written = [{"role": "user", "content": "Why <|im_end|>?"}, CHAT[1]]
    source = chat_file([{"messages": CHAT}, {"messages": CHAT[:1]}, {"messages": written}])
    before = set(tmp_path.rglob("*"))
    assert extract(source, "--preview", 3) == 0
    assert set(tmp_path.rglob("*")) == before
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("Source row 0: ")
    assert '  extracted     2  "Hello there"' in shown
    assert '  skipped       1  "<|im_end|>"  (special token)' in shown
    assert shown[-2] == "  It has special tokens written in a text, which the model reads as such"
    assert shown[-1] == "Source row 1 would be skipped: no assistant turn"


def test_tokens_are_kept_and_skipped(extract, chat_file, tmp_path):
    assert extract(chat_file([{"messages": CHAT}]), "--keep_tokens", "<|im_end|>", "--skip_tokens", "Ġthere") == 0
    tokens = execute_analysis(str(tmp_path / "out"), 0)
    assert [token.text for token in tokens if token.status == EXTRACTED] == ["Hello", "<|im_end|>"]
    assert [(token.text, token.reason) for token in tokens if token.status == SKIPPED] == [(" there", "--skip_tokens")]


def test_template_variables_reasoning_and_tool_calls_are_repeated(extract, chat_file, tmp_path):
    """What the template is given at extraction it is given again at exploration."""
    template = (
        "{% for m in messages %}{{ mood }}{% if m.role == 'assistant' %}{% generation %}{{ m.reasoning_content }}|"
        "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    call = {"name": "zeit", "arguments": {"stadt": "Köln", "am": "morgen"}}
    answer = {"role": "assistant", "content": "Hello", "thinking": "Hm", "tool_calls": [call]}
    source = chat_file([{"messages": [CHAT[0], answer, {"role": "tool", "content": "7"}]}])
    kwargs = json.dumps({"mood": "calm:"})
    assert extract(source, chat_template=template, template_kwargs=kwargs) == 0
    tokens = execute_analysis(str(tmp_path / "out"), 0)
    assert (
        "".join(token.text for token in tokens if token.status == EXTRACTED)
        == f"Hm|Hello{json.dumps(call, ensure_ascii=False)}"
    )
    assert "".join(token.text for token in tokens).count("calm:") == 3


def test_a_dated_template_is_rebuilt_with_the_recorded_date(extract, chat_file, tmp_path):
    dated = "Today is {{ strftime_now('%Y-%m-%d') }}." + TEMPLATE.read_text(encoding="utf-8")
    assert extract(chat_file([{"messages": CHAT}]), chat_template=dated) == 0
    path = tmp_path / "out" / "extraction.json"
    extraction = json.loads(path.read_text())
    row = open_dataset(str(tmp_path / "out")).read_row(0)
    tokenizer = load_tokenizer(str(MODEL))
    assert align_row(row, tokenizer, extraction).input_ids.size
    from chat_logits.data.row_alignment import AlignmentError

    with pytest.raises(AlignmentError, match="alignment_checksum"):
        align_row(row, tokenizer, {**extraction, "template_date": "1999-12-31"})


def test_a_system_prompt_is_put_before_and_recorded(extract, chat_file, tmp_path):
    assert extract(chat_file([{"question": "Hi", "answer": "Hello"}]), system_prompt="Be a pirate.") == 0
    assert rows_in(tmp_path / "out")[0]["messages"][0] == {"role": "system", "content": "Be a pirate.", "extra": None}
    assert open_dataset(str(tmp_path / "out")).manifest.system_prompt == "Be a pirate."


@pytest.mark.parametrize(
    ("row", "options"),
    [
        (
            {"q": "Hi", "a": "Hello there", "answer": "x", "question": "y"},
            {"prompt_column": "q", "response_column": "a"},
        ),
        ({"chosen": CHAT, "rejected": CHAT[:1]}, {"messages_column": "chosen"}),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {}),
    ],
)
def test_columns_by_name_and_nested(extract, chat_file, tmp_path, row, options):
    assert extract(chat_file([row]), **options) == 0
    messages = rows_in(tmp_path / "out")[0]["messages"]
    assert [{"role": m["role"], "content": m["content"]} for m in messages] == CHAT


def test_streaming_gives_the_same_rows(extract, chat_file, tmp_path):
    source = chat_file([{"question": f"{i}?", "answer": f"It is {i}."} for i in range(10)])
    assert extract(source, out="whole", rows_per_shard=4) == 0
    assert extract(source, "--streaming", out="stream", rows_per_shard=4) == 0
    assert extract(source, "--streaming", out="few", max_samples=6, rows_per_shard=4) == 0
    whole, stream, few = (rows_in(tmp_path / out) for out in ("whole", "stream", "few"))
    assert len(whole) == 10 and whole == stream and few[:4] == whole[:4]
    assert_alike(few[4:], whole[4:6])  # whose shard has two more rows there, and so another batch
    assert [s.num_rows for s in open_dataset(str(tmp_path / "few")).shards] == [4, 2]


def test_a_template_whose_prefixes_do_not_nest_stops_before_the_model_loads(extract, chat_file, tmp_path, capsys):
    counting = "{{ messages | length }}" + load_tokenizer(str(MODEL)).chat_template
    assert extract(chat_file([{"messages": CHAT}]), chat_template=counting) == 2
    message = capsys.readouterr().err
    assert (
        "renders differently alone than inside the whole: after '' it has '1" in message and "Three ways out" in message
    )
    assert "Loading" not in message and not (tmp_path / "out").exists()


def test_later_rows_that_do_not_nest_are_skipped_and_counted(extract, chat_file, capsys):
    own = load_tokenizer(str(MODEL)).chat_template.replace("named SmolLM", "called SmolLM")
    odd = "{{ messages | length if messages[0].content == 'odd' else '' }}" + own
    rows = [{"messages": CHAT}] * 32 + [{"messages": [{"role": "user", "content": "odd"}, CHAT[1]]}]
    assert extract(chat_file(rows), chat_template=odd) == 0
    summary = capsys.readouterr().out
    assert "32 written, 1 skipped" in summary and "1 × the chat template has no {% generation %} blocks" in summary


CONFIG_CODE = """
import pathlib
from transformers import LlamaConfig
pathlib.Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODEL_CODE = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def model_with_code(tmp_path):
    """A model that brings its own classes, whose code leaves a file behind when it runs."""
    model = make_tiny_model(tmp_path / "own", vocab_size=49_152)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    config["model_type"] = "own"
    (model / "config.json").write_text(json.dumps(config))
    (model / "configuration_own.py").write_text(CONFIG_CODE.format(marker=str(tmp_path / "it ran")))
    (model / "modeling_own.py").write_text(MODEL_CODE)
    return model


def test_a_models_own_code_runs_only_if_it_is_trusted(extract, chat_file, tmp_path, capsys, model_with_code):
    source = chat_file([{"messages": CHAT}])
    assert extract(source, model_id=model_with_code) == 2
    message = capsys.readouterr().err
    assert "it comes with its own Python code" in message and "--trust_remote_code" in message
    assert not (tmp_path / "it ran").exists() and not (tmp_path / "out").exists()
    assert extract(source, "--trust_remote_code", model_id=model_with_code) == 0
    assert (tmp_path / "it ran").exists() and len(rows_in(tmp_path / "out")) == 1


def test_a_template_gets_no_further_than_its_sandbox(extract, chat_file, tmp_path, capsys):
    """The way out that unsandboxed templates have, to a file that must not come to be."""
    marker = tmp_path / "escaped"
    escape = "{{ messages.__class__.__base__.__subclasses__() }}"
    escape += "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    assert extract(chat_file([{"messages": CHAT}]), chat_template=escape) in (1, 2)
    assert "error: " in capsys.readouterr().err and not marker.exists()
