"""How close a student comes by stored rows to one that had the teacher's whole distribution at every step.

    python benchmarks/bench_training.py [--arms oracle k64-draws …] [--steps 200] [--seeds 0] [--threads 2]
    python benchmarks/bench_training.py --table

SmolLM2-135M-Instruct is the teacher, its first 22 layers are the student, the English construction questions the data
(demo/fetch.py). The last two layers and the last norm are trained; with --trained_layers 22 all are, and the last
digits of sums move held-out KL by more than what is to be measured. The embeddings, which are the lm_head too, stay the
teacher's unless --train_head: AdamW scales each weight's step by that weight's own gradients, and those of a token that
is drawn now and then are scaled down when it is drawn, up when it is not. Every arm takes the same batches in the same
order. Held-out KL is exact: the teacher's whole distribution against the student's. What an arm is given:

- oracle: the whole distribution, from the teacher's last hidden states
- k64-draws, k16-draws, k8-draws: rows as they are stored, by training_dataset and the package's loss
- k64-renormalised, k8-renormalised: rows without draws, by allow_biased
- k64-bucket: the nucleus, and the mass of the rest as one more outcome
- text: the target tokens alone (hard_weight 1)

Rows are extracted once at K = 64, S = 16, p = 0.98, and thinned to the other settings by the package. Gradients are
compared, over 16 conversations, at three students: the untrained one, and the oracle's at a quarter of its steps and at
its end. Whatever is finished is in results.json; the same command goes on, and --table prints what is there.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from functools import cached_property, partial
from io import StringIO
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn.functional import kl_div  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import extract_logits  # noqa: E402
from chat_logits.analysis.thinning import Setting, stored_setting, thin_dataset  # noqa: E402
from chat_logits.storage.dataset import open_dataset  # noqa: E402
from chat_logits.training.collator import PackingCollator, model_inputs  # noqa: E402
from chat_logits.training.dataset import training_dataset  # noqa: E402
from chat_logits.training.student import StudentLoss, split_batch  # noqa: E402

MODEL = REPO / ".cache" / "smollm2-135m-instruct"
CONVERSATIONS = REPO / ".cache" / "zaragoza" / "faq-en-sharegpt.jsonl"
TEMPLATE = REPO / "templates" / "smollm2.jinja"
FULL = Setting(64, 16, 0.98)
WARM_UP = 0.05  # of the steps; afterwards the rate falls along a cosine to a tenth
FOR_GRADIENTS = 16  # conversations
collate = PackingCollator()


# --- what a student learns from ---


class Batch(NamedTuple):
    """A collator's batch, and the teacher's logits (n, V) at its predicting positions, where an arm asks for them."""

    tensors: dict
    teacher_logits: Callable[[], torch.Tensor]


def dense_loss(student, batch: Batch) -> torch.Tensor:
    """Forward KL to the whole distribution, summed over positions, nats."""
    log_q = student(**model_inputs(batch.tensors)).logits[0].log_softmax(-1)
    return kl_div(log_q, batch.teacher_logits().log_softmax(-1), reduction="sum", log_target=True)


def sparse_loss(student, batch: Batch) -> torch.Tensor:
    """The package's own."""
    return StudentLoss(student)(student, *split_batch(batch.tensors))


def bucket_loss(student, batch: Batch) -> torch.Tensor:
    """Cross-entropy to the nucleus and one outcome for all else, summed over positions."""
    columns = slice(1, 1 + FULL.top_k)
    ids, weights = batch.tensors["target_ids"][:, columns].long(), batch.tensors["target_weights"]
    nucleus, rest = weights[:, columns], weights[:, columns.stop :].sum(1)
    ids = ids.where(nucleus > 0, ids[:, :1])  # absent entries name one that is there
    log_q = student(**model_inputs(batch.tensors)).logits[0].log_softmax(-1)
    log_rest = log_q.scatter(1, ids, -torch.inf).logsumexp(1)
    return -(nucleus * log_q.gather(1, ids)).sum() - (rest * log_rest).sum()


class Arm(NamedTuple):
    """``read`` is the setting of the rows that it reads, ``stored`` of those that it needs; None for no rows."""

    label: str
    loss: Callable[..., torch.Tensor]
    read: Setting = FULL
    stored: Setting | None = None
    options: Mapping[str, Any] = MappingProxyType({})  # of training_dataset


def _draws(setting: Setting) -> Arm:
    return Arm("nucleus and draws, K = {}, S = {}, p = {}".format(*setting), sparse_loss, setting, setting)


def _renormalised(setting: Setting) -> Arm:
    label = f"nucleus renormalised, K = {setting.top_k}, p = {setting.top_p}"
    return Arm(label, sparse_loss, setting, setting, {"allow_biased": True})


ARMS = {
    "oracle": Arm("the whole distribution", dense_loss),
    "k64-draws": _draws(FULL),
    "k8-draws": _draws(Setting(8, 8, 0.9)),
    "k8-renormalised": _renormalised(Setting(8, 0, 0.9)),
    "k64-renormalised": _renormalised(Setting(64, 0, 0.98)),
    "k64-bucket": Arm("nucleus and one bucket for the rest, K = 64", bucket_loss, FULL, Setting(64, 0, 0.98)),
    "k16-draws": _draws(Setting(16, 8, 0.95)),
    "text": Arm("the text alone", sparse_loss, options={"hard_weight": 1.0}),
}
IN_TABLE = ("k64-draws", "k16-draws", "k8-draws", "k64-renormalised", "k64-bucket", "k8-renormalised", "text")


# --- rows, and the teacher ---


class Data:
    """``count`` conversations, ``held_out`` of them kept out: rows, thinned rows, and the teacher's distributions."""

    def __init__(self, folder: Path, count: int, held_out: int):
        self._folder, self._count = folder / f"rows-{count}", count
        numbers = np.random.default_rng(0).permutation(count)
        self.held_out, self.trained_on = numbers[:held_out], numbers[held_out:]
        self._examples: dict[str, list[dict]] = {}

    @cached_property
    def rows(self) -> Path:
        """The folder of what is extracted."""
        place = self._folder / "extracted"
        flags = ["--model_id", MODEL, "--dataset_id", CONVERSATIONS, "--chat_template", TEMPLATE, "--output_dir", place]
        options = ["--max_samples", self._count, "--device", "cpu"]
        if not (place / "shards.json").exists():
            with redirect_stdout(StringIO()):
                assert extract_logits.main([*map(str, flags + options)]) == 0
        return place

    def thinned(self, setting: Setting) -> Path:
        """The folder of rows with this setting."""
        stored, place = open_dataset(str(self.rows)), self._folder / "K{}-S{}-P{}".format(*setting)
        if setting == stored_setting(stored.manifest):
            return self.rows
        if not place.exists():
            thin_dataset(stored, setting, str(place))
        return place

    def bytes_per_token(self, setting: Setting) -> float:
        shards = open_dataset(str(self.thinned(setting))).shards
        return sum(shard.num_bytes for shard in shards) / sum(shard.num_tokens for shard in shards)

    def batch(self, arm: str, numbers: np.ndarray) -> Batch:
        """These conversations, packed."""
        if arm not in self._examples:
            folder, cache = self.thinned(ARMS[arm].read), str(self._folder / "cache")
            rows = training_dataset(folder, MODEL, end_of_turn="skip", cache_dir=cache, **ARMS[arm].options)
            self._examples[arm] = [rows[i] for i in range(len(rows))]
        examples = [self._examples[arm][i] for i in numbers]
        return Batch(collate(examples), lambda: torch.cat([self._hidden[i] for i in numbers]) @ self._head.T)

    @cached_property
    def _hidden(self) -> list[torch.Tensor]:
        """The teacher's last hidden states, float32 (n, H), at the predicting positions of each conversation."""
        place = self._folder / "hidden.pt"
        if not place.exists():
            self.batch("k64-draws", self.held_out)
            torch.save([self._hidden_of(example) for example in self._examples["k64-draws"]], place)
        return torch.load(place)

    @torch.no_grad()
    def _hidden_of(self, example: dict) -> torch.Tensor:
        """Raises AssertionError where the stored nucleus is not what the teacher says there."""
        states = self._teacher.model(torch.from_numpy(example["input_ids"])[None]).last_hidden_state[0]
        hidden = states[torch.from_numpy(example["positions"]) - 1].clone()
        ids, weights = (torch.from_numpy(example[f"target_{name}"])[:, 1:2] for name in ("ids", "weights"))
        probs = (hidden @ self._head.T).softmax(-1).gather(1, ids.long())
        assert (probs - weights).abs().max() < 0.01
        return hidden

    @cached_property
    def _teacher(self):
        return AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()

    @cached_property
    def _head(self) -> torch.Tensor:
        return self._teacher.lm_head.weight.detach()


def student_of(layers: int, trained: int, train_head: bool):
    """The teacher's first layers, with its embeddings, last norm and lm_head; the last ``trained`` can be trained."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    model.model.layers[: layers - trained].requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(train_head)
    return model


# --- what is measured ---


class Bench(NamedTuple):
    """All that a run needs."""

    data: Data
    options: argparse.Namespace

    def order(self, seed: int) -> Iterator[np.ndarray]:
        """The conversations of each step, each once before any comes again."""
        size, generator, left = self.options.batch, np.random.default_rng(seed), np.zeros(0, np.int64)
        for _ in range(self.options.steps):
            while len(left) < size:
                left = np.concatenate([left, generator.permutation(self.data.trained_on)])
            yield left[:size]
            left = left[size:]

    def student(self):
        return student_of(self.options.layers, self.options.trained_layers, self.options.train_head)

    def train(self, arm: str, seed: int) -> dict:
        """Held-out KL on the way, nats, by the number of steps taken."""
        student, steps, started = self.student(), self.options.steps, time.time()
        trained = [each for each in student.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.options.learning_rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
        curve, measured = {0: self.held_out(student)}, {max(1, steps * part // 4) for part in range(1, 5)}
        for step, numbers in enumerate(self.order(seed), 1):
            batch = self.data.batch(arm, numbers)
            loss = ARMS[arm].loss(student, batch) / len(batch.tensors["predicting"])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)  # as transformers' trainer does
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step in measured:
                curve[step] = self.held_out(student)
                print(f"{arm} seed {seed}, step {step}: {curve[step]:.4f}, {time.time() - started:.0f} s", flush=True)
                self.keep(student, arm, seed, step)
        return {"curve": curve, "kl": curve[steps], "seconds": round(time.time() - started)}

    def keep(self, student, arm: str, seed: int, step: int) -> None:
        """Save the students that gradients are compared at."""
        if (arm, seed) == ("oracle", self.options.seeds[0]) and step in self.trained_steps:
            torch.save(student.state_dict(), self.place(step))

    @property
    def trained_steps(self) -> tuple[int, int]:
        return max(1, self.options.steps // 4), self.options.steps

    def place(self, step: int) -> Path:
        """Of a saved student."""
        return self.options.folder / f"student-{name_of(settings_of(self.options))}-step{step}.pt"

    @torch.no_grad()
    def held_out(self, student) -> float:
        """Mean forward KL over the held-out conversations' positions, nats."""
        total, positions = 0.0, 0
        for start in range(0, len(self.data.held_out), 8):
            batch = self.data.batch("k64-draws", self.data.held_out[start : start + 8])
            total += dense_loss(student, batch).item()
            positions += len(batch.tensors["predicting"])
        return total / positions

    def gradients(self, step: int) -> dict:
        """By arm, the cosine and the relative error of the gradient to the oracle's, of the student after this step."""
        student = self.student()
        if step:
            student.load_state_dict(torch.load(self.place(step)))
        found, oracle = {}, self.gradient(student, "oracle")
        for arm in IN_TABLE:
            found[arm] = compared(self.gradient(student, arm), oracle)
            print(f"gradient at step {step}, {arm}: cosine {found[arm][0]:.4f}, error {found[arm][1]:.3f}", flush=True)
        return found

    def gradient(self, student, arm: str) -> list[torch.Tensor]:
        """Of the sum of the arm's loss over some of the conversations that are trained on, by parameter."""
        student.zero_grad()
        for start in range(0, FOR_GRADIENTS, 4):
            numbers = self.data.trained_on[start : min(start + 4, FOR_GRADIENTS)]
            ARMS[arm].loss(student, self.data.batch(arm, numbers)).backward()
        return [each.grad.clone() for each in student.parameters() if each.requires_grad]


def compared(gradient: list[torch.Tensor], oracle: list[torch.Tensor]) -> tuple[float, float]:
    """Cosine and relative error, in float64: a hundred million float32 products add up to a percent of error."""
    sums = torch.zeros(4, dtype=torch.float64)
    for one, other in zip(gradient, oracle, strict=True):
        one, other = one.double(), other.double()
        sums += torch.stack(
            [(one * other).sum(), one.square().sum(), other.square().sum(), (one - other).square().sum()]
        )
    dot, own, whole, error = sums.tolist()
    return dot / math.sqrt(own * whole), math.sqrt(error / whole)


def rate_at(step: int, steps: int) -> float:
    """The learning rate, as a share of the largest."""
    warm_up = max(1, round(steps * WARM_UP))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


# --- what is finished ---


def settings_of(options: argparse.Namespace) -> dict:
    """What results must have in common to be compared."""
    names = ("layers", "trained_layers", "conversations", "held_out", "steps", "batch", "learning_rate", "train_head")
    return {name: getattr(options, name) for name in names}


def name_of(settings: dict) -> str:
    return "-".join(map(str, settings.values()))


class Results:
    """The finished ones of these settings, in results.json by what they are of."""

    def __init__(self, options: argparse.Namespace):
        self._place = options.folder / "results.json"
        self._all = json.loads(self._place.read_text()) if self._place.exists() else {}
        self.found = self._all.setdefault(name_of(settings_of(options)), {"settings": settings_of(options)})

    def once(self, key: str, compute: Callable[[], object]) -> None:
        if key in self.found:
            return
        self.found[key] = compute()
        self._place.with_suffix(".new").write_text(json.dumps(self._all, indent=1))
        self._place.with_suffix(".new").replace(self._place)

    def over_oracle(self, arm: str) -> list[float]:
        """How much more KL, nats, by the seeds that both have."""
        pairs = [(self.found.get(f"{arm} {seed}"), self.found.get(f"oracle {seed}")) for seed in range(100)]
        return [one["kl"] - other["kl"] for one, other in pairs if one and other]

    def gradients(self, arm: str) -> list[list[float]]:
        """Cosines and relative errors."""
        return [value[arm] for key, value in self.found.items() if key.startswith("gradients ")]

    def table(self) -> Iterator[str]:
        oracle = [value["kl"] for key, value in self.found.items() if key.startswith("oracle ")]
        over = f"the oracle's {mean(oracle):.3f}" if oracle else "the oracle's"
        yield f"| what the student learns from | bytes per token | held-out KL over {over} | gradient: cosine, error |"
        yield "| --- | --- | --- | --- |"
        for arm in IN_TABLE:
            size = self.found.get(f"bytes {arm}")
            cells = [ARMS[arm].label, f"{size:.0f}" if size else "–", kl_text(self.over_oracle(arm))]
            yield f"| {' | '.join([*cells, gradient_text(self.gradients(arm))])} |"


def kl_text(found: list[float]) -> str:
    if not found:
        return "…"
    spread = f" ({min(found):.4f} – {max(found):.4f}, {len(found)} seeds)" if len(found) > 1 else ""
    return f"{mean(found):+.4f}{spread}"


def gradient_text(found: list[list[float]]) -> str:
    """Means over the students."""
    return "{:.3f}, {:.2f}".format(*map(mean, zip(*found, strict=True))) if found else "…"


def run(bench: Bench, results: Results) -> None:
    """All that is not finished yet: the first seed's arms, with the gradients behind its oracle, then the other
    seeds'."""
    for arm in bench.options.arms:
        if stored := ARMS[arm].stored:
            results.once(f"bytes {arm}", partial(bench.data.bytes_per_token, stored))
    for seed in bench.options.seeds:
        for arm in bench.options.arms:
            results.once(f"{arm} {seed}", partial(bench.train, arm, seed))
            if arm == "oracle" and seed == bench.options.seeds[0]:
                for step in (0, *bench.trained_steps):
                    results.once(f"gradients {step}", partial(bench.gradients, step))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the order of the conversations")
    parser.add_argument("--layers", type=int, default=22, help="of the student")
    parser.add_argument("--trained_layers", type=int, default=2, help="its last ones, which are trained")
    parser.add_argument("--conversations", type=int, default=216, help="to train on")
    parser.add_argument("--held_out", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4, help="conversations of a step")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--train_head", action="store_true", help="train the embeddings, which are the lm_head, too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=REPO / "outputs" / "bench_training")
    parser.add_argument("--table", action="store_true", help="print what is finished, and train nothing")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    results = Results(options)
    if not options.table:
        data = Data(options.folder, options.conversations + options.held_out, options.held_out)
        run(Bench(data, options), results)
    print("\n".join(results.table()))


if __name__ == "__main__":
    main()
