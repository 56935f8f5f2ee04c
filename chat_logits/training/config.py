"""The options of a student's training."""

import json
from dataclasses import dataclass
from pathlib import Path

from chat_logits.errors import UsageError
from chat_logits.options import COMPUTED, READ, WRITTEN, Config, option
from chat_logits.storage.disk import refuse_filled
from chat_logits.training.targets import END_OF_TURN

TAUGHT = "what is taught"
# In a student's folder: the record, and the checkpoints of transformers, which writes STATE last into each.
RECORD, CHECKPOINTS, STATE = "training.json", "checkpoints", "trainer_state.json"
LOCK = ".lock"  # exists while a training runs


@dataclass(frozen=True, repr=False)
class TaughtOptions(Config):
    """What is taught from a logit dataset's rows, by this package's training or another trainer."""

    hard_weight: float = option(
        0.0,
        help="share of the text's own token in what is taught, 0 to 1; the rest is the teacher's distribution",
        group=TAUGHT,
        metavar="SHARE",
        least=0,
        most=1,
        example="0.1",
    )
    end_of_turn: str = option(
        "hard",
        help="ends of turns that were not extracted: taught as they stand in the text, or not at all",
        group=TAUGHT,
        choices=END_OF_TURN,
    )
    allow_biased: bool = option(
        False, help="teach rows without draws from the tail, too, renormalised", unset="refuse", group=TAUGHT
    )


@dataclass(frozen=True, repr=False)
class TrainConfig(TaughtOptions):
    """A student, the logit dataset that it learns from, and how it is trained."""

    logit_dataset_id: str = option(
        help="the logit dataset to learn from, a folder or a Hub id",
        group=READ,
        metavar="ID",
        example="outputs/chats",
    )
    revision: str | None = option(
        None, help="branch, tag or commit of a Hub dataset", unset="its main branch", group=READ, metavar="REV"
    )
    student_id: str = option(
        help="the model to train, a folder or a Hub id, with the tokenizer that the rows were extracted with",
        group=READ,
        metavar="ID",
        example="Qwen/Qwen2.5-0.5B-Instruct",
    )
    student_revision: str | None = option(
        None, help="branch, tag or commit of a Hub model", unset="its main branch", group=READ, metavar="REV"
    )
    max_length: int | None = option(
        None,
        help="skip conversations of more tokens",
        unset="the most that the student reads",
        group=READ,
        metavar="TOKENS",
        least=2,
    )
    held_out: int | None = option(
        None,
        help="conversations that are not trained on: how far the student is from the teacher is measured on them",
        unset="a twentieth, 256 at most",
        group=READ,
        metavar="N",
        least=1,
    )
    output_dir: str = option(
        help="folder for the trained student",
        group=WRITTEN,
        metavar="FOLDER",
        example="outputs/student",
    )
    resume: bool = option(
        False,
        help="continue from the last checkpoint in the folder",
        unset="a new training, in a new or an empty folder",
        group=WRITTEN,
        example="",
    )
    save_every: int = option(
        500, help="steps from one checkpoint to the next; the last one is kept", group=WRITTEN, metavar="STEPS", least=1
    )
    batch_tokens: int = option(
        4096,
        help="tokens in a batch, including prompts and padding: as many conversations as fit; a longer one is a batch "
        "of its own",
        group=COMPUTED,
        metavar="TOKENS",
        least=1,
        example="8192",
    )
    accumulate: int = option(1, help="batches in a step, in each process", group=COMPUTED, metavar="N", least=1)
    epochs: int = option(
        1,
        help="how many times each conversation is read",
        group=COMPUTED,
        metavar="N",
        least=1,
        example="3",
    )
    max_steps: int | None = option(
        None,
        help="steps to take",
        unset="as the epochs need",
        group=COMPUTED,
        metavar="STEPS",
        least=1,
        example="200",
    )
    learning_rate: float | None = option(
        None,
        help="of AdamW, after a warm-up over 3% of the steps; falls along a cosine to 0",
        unset="2e-5; 2e-4 for an adapter",
        group=COMPUTED,
        metavar="RATE",
        above=0,
        most=1,
        example="1e-5",
    )
    measure_every: int | None = option(
        None,
        help="steps from one measurement on held-out conversations to the next",
        unset="a tenth of all",
        group=COMPUTED,
        metavar="STEPS",
        least=1,
    )
    lora_rank: int | None = option(
        None,
        help="train an adapter of this rank on all linear layers, which needs peft",
        unset="train all weights",
        group=COMPUTED,
        metavar="RANK",
        least=1,
        example="16",
    )
    freeze_embeddings: bool = option(
        False,
        help="leave the embeddings and the lm_head as they are: small batches at a high rate would lower tokens that "
        "are seldom drawn",
        unset="train them, except with an adapter",
        group=COMPUTED,
    )
    dtype: str = option(
        "auto",
        help="number format of the layers' products; weights are float32",
        unset="auto: bfloat16 on a GPU that has it, else float32",
        group=COMPUTED,
        choices=("auto", "float32", "bfloat16"),
    )
    device: str | None = option(
        None, help="cpu, or the accelerator", unset="an accelerator, else cpu", group=COMPUTED, choices=("cpu",)
    )
    attn_implementation: str | None = option(
        None, help="eager, sdpa, …", unset="transformers' choice", group=COMPUTED, metavar="NAME"
    )
    gradient_checkpointing: bool = option(
        False,
        help="compute a layer's activations again in the backward pass: less memory, more time",
        unset="keep them",
        group=COMPUTED,
    )
    seed: int = option(0, help="of the held-out choice and of the order", group=COMPUTED, metavar="N", least=0)

    def check_output_dir(self) -> None:
        """Raise UsageError if ``output_dir`` is the student's own folder, a file, or, for a new training, a folder that
        is not empty."""
        folder = Path(self.output_dir)
        if Path(self.student_id).is_dir() and folder.resolve() == Path(self.student_id).resolve():
            raise UsageError(
                f"`output_dir` {folder}: the folder of the student itself, which stays as it is; name another"
            )
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"`output_dir` {folder}: a file, expected a folder")
        if not self.resume and not _has_learnt_nothing(folder):
            refuse_filled(folder, "output_dir", ", or `resume` to continue there")

    @property
    def rate(self) -> float:
        return self.learning_rate or (2e-5 if self.lora_rank is None else 2e-4)


def checkpoint_states(folder: Path) -> list[Path]:
    """The ``STATE`` files of the complete checkpoints in a student's folder."""
    return [*(folder / CHECKPOINTS).glob(f"checkpoint-*/{STATE}")]


def _has_learnt_nothing(folder: Path) -> bool:
    """Whether the folder has only what a training leaves if it ended before its first checkpoint."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names <= {RECORD, CHECKPOINTS, LOCK} or checkpoint_states(folder):
        return False
    begun = [*(folder / CHECKPOINTS).iterdir()] if (folder / CHECKPOINTS).is_dir() else []
    return _is_unfinished(folder / RECORD) if RECORD in names else not begun and not (folder / CHECKPOINTS).is_file()


def _is_unfinished(record: Path) -> bool:
    """Whether this is the record of a training that did not finish."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("is_finished") is False
