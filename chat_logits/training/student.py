"""A student's forward pass that computes the loss instead of logits, and the trainer that uses it."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, has_length

from chat_logits.errors import UsageError
from chat_logits.training.distance import DistanceSums
from chat_logits.training.head import logit_transform, weight_and_bias
from chat_logits.training.loss import PositionScores, fused_sparse_kd_loss

logger = logging.getLogger(__name__)

SEQUENCE_INPUTS = ("input_ids", "attention_mask", "position_ids")  # of a batch; the rest is for the loss
TARGET_NAMES = (
    "logits_to_keep",
    "predicting",
    "target_ids",
    "target_weights",
    "entropy",
    "tail_entropy",
    "num_sampled",
)

LOGGED = ("kl", "kl_tail", "agreement")
LAUNCHER = "torchrun --nproc_per_node"


class BatchTarget(NamedTuple):
    """What a batch teaches at its N predicting positions.

    ``rows`` (N,) int64 index the flattened positions of input ids (B, T); ``ids`` and ``weights`` (N, M), ``entropy``
    and ``tail_entropy`` (N,), nats, are as in ``Targets``; the last ``num_sampled`` (N,) int64 ids are draws.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor
    tail_entropy: torch.Tensor
    num_sampled: torch.Tensor

    def within(self, vocab_size: int) -> "BatchTarget":
        """The target without token ids of ``vocab_size`` or more; the remaining weights are not scaled up, and the
        entropies stay the same."""
        ids = self.ids.clamp(max=vocab_size - 1)
        return self._replace(ids=ids, weights=self.weights.masked_fill(self.ids >= vocab_size, 0))

    def divergences(self, scores: PositionScores) -> torch.Tensor:
        """For each position, (N, 4) float32: 1, forward KL and the tail's part of it, nats, and whether the most
        probable tokens agree."""
        kl, tail = scores.cross_entropy - self.entropy, scores.tail - self.tail_entropy
        return torch.stack([torch.ones_like(kl), kl, tail, scores.agrees.to(kl.dtype)], dim=1)


def split_batch(batch: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], BatchTarget]:
    """The model's own arguments, and the target. Raises UsageError if the batch has no target."""
    missing = [name for name in TARGET_NAMES if name not in batch]
    if missing:
        raise UsageError(
            f"a batch without {', '.join(missing)}: expected one of this package's collators over a training_dataset"
        )
    kept, predicting, *target = (batch[name] for name in TARGET_NAMES)
    rows = predicting // len(kept) * batch["input_ids"].shape[1] + kept[predicting % len(kept)]
    return {name: batch[name] for name in SEQUENCE_INPUTS if name in batch}, BatchTarget(rows, *target)


def conversation_sums(batch: Mapping[str, torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """The sums of ``values`` (N, 4), as of ``BatchTarget.divergences``, for each of a batch's C conversations, (C, 4);
    zeros for one without positions."""
    numbers = _conversations(batch)
    _, target = split_batch(batch)
    return values.new_zeros(int(numbers[-1]) + 1, 4).index_add_(0, numbers[target.rows], values)


def _conversations(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The conversation, from 0, that each place of a batch belongs to, int64 (B·T,): its row or, if packed, the last
    one that begins there or before."""
    ids = batch["input_ids"]
    if "position_ids" in batch:
        return (batch["position_ids"] == 0).flatten().cumsum(0) - 1
    return torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])


class StudentLoss:
    """Computes the loss where the student's lm_head would compute logits: inside the forward pass, so that it works
    with DDP, FSDP and mixed precision, and without ever holding the logits of a whole batch.

    ``student`` is a causal language model of transformers, with or without an adapter. A target's weight on ids that
    the student does not have is left out, with a warning the first time: larger models of a family may have more rows
    without a token. Raises ToolkitError and UsageError as ``logit_transform`` and ``fused_sparse_kd_loss`` do.
    """

    def __init__(self, student: torch.nn.Module):
        self._head, self._transform = student.get_output_embeddings(), logit_transform(student)
        self._told = vars(student).setdefault("_unknown_ids_told", [])  # shared by all losses of this student

    def __call__(
        self,
        model: torch.nn.Module,
        arguments: Mapping[str, Any],
        target: BatchTarget,
        scores: PositionScores | None = None,
    ) -> torch.Tensor:
        """The sum of forward KL over the batch's positions, nats, float32, with its gradient.

        ``model`` is the student, or its wrapper for training on several devices; ``scores``, if given, are filled in
        for each position.
        """
        found = []
        options = {"entropy": target.entropy, "transform": self._transform, "scores": scores, "reduction": "sum"}

        def compute(head: torch.nn.Module, args: tuple) -> tuple:
            hidden, known = args[0].flatten(0, -2)[target.rows], self._known(target, len(weight_and_bias(head)[0]))
            found.append(fused_sparse_kd_loss(hidden, head, known.ids, known.weights, **options))
            return (args[0][..., -1:, :], *args[1:])  # so the head itself computes one position

        handle = self._head.register_forward_pre_hook(compute)
        try:
            model(**arguments, use_cache=False)
        finally:
            handle.remove()
        return found[0]

    def _known(self, target: BatchTarget, vocab_size: int) -> BatchTarget:
        """The target without token ids that the student does not have."""
        if not target.ids.numel() or (most := int(target.ids.max())) < vocab_size:
            return target
        known = target.within(vocab_size)
        if not self._told:
            self._told.append(most)
            lost = 1 - float(known.weights.sum() / target.weights.sum())
            logger.warning(
                f"The student has {vocab_size:,} token ids, and the teacher's go up to {most:,}: those beyond are left "
                f"out of what is taught and measured, from now on. Their share of this batch's weight is {lost:.2g}"
            )
        return known

    def divergences(self, student: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """``BatchTarget.divergences`` of a batch's positions, float64 (N, 4) on the CPU; the batch is moved to the
        student's device."""
        device = self._head.weight.device
        placed = {name: part.to(device) for name, part in batch.items() if torch.is_tensor(part)}
        arguments, target = split_batch(placed)
        scores = PositionScores.empty(target.num_sampled)
        self(student, arguments, target, scores)
        return target.divergences(scores).cpu().double()


def refuse_several_gpus(arguments: TrainingArguments) -> None:
    """Raise UsageError if one process has several GPUs: transformers would split a packed batch over them."""
    if arguments.n_gpu > 1:
        raise UsageError(
            f"one process has {arguments.n_gpu} GPUs: expected one GPU a process. Start it by `{LAUNCHER} "
            f"{arguments.n_gpu} …` to train on all, or with `CUDA_VISIBLE_DEVICES=0` to train on one."
        )


class StudentTrainer(Trainer):
    """``transformers.Trainer`` on stored distributions: the loss is the mean forward KL over all positions, nats.

    The mean is over all accumulated batches of a step, and over all processes. Batches are those of this package's
    collators; their ``labels`` are only counted. To combine it with another subclass of ``Trainer``, list it first.

    In addition to ``loss``, logs have the means over all positions trained on since the last log, by all processes:
    ``kl``, forward KL, nats; ``kl_tail``, the part of it that the draws from the tail add, Σ w·(log p − log q) over
    them; and ``agreement``, the share of positions where the student's most probable token is the target's. All are of
    the training target, not of the teacher's distribution alone: ends of turns that are taught as certain are counted,
    with KL = NLL, and if ``hard_weight`` h mixes in the text, KL is replaced by (1 − h)·KL + h·NLL. They are not 0 for
    a student that equals the teacher. The held-out figures of ``run.train`` are of the teacher alone.

    ``evaluate`` gives ``eval_kl`` and its standard error ``eval_error``, ``eval_kl_tail`` and ``eval_agreement`` of the
    evaluation's own targets, as in ``Distance``, and ``eval_loss``, which is the KL again: over all positions, in
    whatever batches and processes. ``compute_metrics`` is not called, as there are no logits. In several processes the
    dataset needs a length (no stream), as accelerate repeats conversations to fill the last batches, and only then are
    they known and left out. Raises UsageError for such a stream, and if one process has several GPUs.
    """

    loss_is_scaled_for_ga = True  # divided by the step's positions here

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        refuse_several_gpus(self.args)
        self.args.remove_unused_columns = False
        if (self.args.metric_for_best_model or "").endswith(("kl", "kl_tail", "error")):
            self.args.greater_is_better = False  # transformers knows that of losses alone
        # Dispatching, the default for streams, would cut all tensors of a packed batch to its single row.
        self.accelerator.dataloader_config.dispatch_batches = False
        self.args.prediction_loss_only = True  # there are no logits
        self.model_accepts_loss_kwargs = True  # so that a step's positions are counted
        self._student_loss: StudentLoss | None = None
        self._since_log: torch.Tensor | None = None  # sums of ``divergences``
        self._evaluated = DistanceSums()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The batch's part of the step's mean forward KL, nats."""
        total, divergences = self._measured(model, inputs)
        loss = total / (len(divergences) if num_items_in_batch is None else num_items_in_batch)
        if model.training:
            sums = divergences.sum(dim=0)
            self._since_log = sums if self._since_log is None else self._since_log + sums
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # their gradients are averaged
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def _measured(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the loss over a batch's positions, and ``BatchTarget.divergences`` of each."""
        if self._student_loss is None:
            self._student_loss = StudentLoss(self.accelerator.unwrap_model(model))
        arguments, target = split_batch(inputs)
        scores = PositionScores.empty(target.num_sampled)
        total = self._student_loss(model, arguments, target, scores)
        return total, target.divergences(scores)

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **options: Any
    ) -> EvalLoopOutput:
        """As ``Trainer``'s, with the figures of ``Distance`` over all conversations that it runs the student on."""
        self._evaluated = DistanceSums()
        if self.accelerator.num_processes > 1 and not has_length(dataloader.dataset):
            raise UsageError("evaluation in several processes: the dataset is a stream; expected one with a length")
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **options)
        if output.metrics is not None and self._evaluated.conversations:
            point = asdict(self._evaluated.distance())
            figures = {"loss": point["kl"]} | {name: point[name] for name in ("kl", "error", "kl_tail", "agreement")}
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple:
        """Add the conversations of all processes' batches to those evaluated. Returns nothing, since ``Trainer`` would
        average it over batches."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, divergences = self._measured(model, inputs)
        sums = conversation_sums(inputs, divergences)
        for one in self.accelerator.gather_for_metrics(sums).cpu().double().numpy():  # without what fills a last batch
            self._evaluated.add(one)
        return None, None, None

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """As ``Trainer``'s, with the means since the last log of a training loss. All processes call it."""
        if "loss" in logs and self._since_log is not None:
            positions, *sums = self.accelerator.reduce(self._since_log, "sum").tolist()
            logs |= zip(LOGGED, (value / max(1, positions) for value in sums), strict=True)
            self._since_log = None
        super().log(logs, *args, **options)
