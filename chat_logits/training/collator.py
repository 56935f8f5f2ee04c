"""Examples to batches: packed one after another into a single row, or padded to rows of one length.

With either batch, the lm_head is applied to the predicting positions alone: ``logits_to_keep`` are the columns that a
transformers model passes to its head, and ``predicting`` is each target's place in the output.
"""

from dataclasses import dataclass

import numpy as np
import torch

from chat_logits.errors import UsageError
from chat_logits.training.examples import IGNORED

MODEL_INPUTS = ("input_ids", "position_ids", "attention_mask", "logits_to_keep", "use_cache")
TARGETS = ("target_ids", "target_weights", "entropy", "tail_entropy")  # copied from the examples
PROBES = (range(1, 8), range(8, 14))  # token ids of two texts, which any vocabulary has
FLOAT32_NOISE, NOISE = 1e-4, 2e-2  # relative to the largest logit: from the order of summation; with 16-bit rounding


@dataclass(frozen=True)
class PackingCollator:
    """Packs examples of ``training_dataset`` into one row of T tokens, N of them predicted.

    A batch has

    - ``input_ids``, ``labels`` and ``position_ids`` (1, T) int64; positions restart at 0 for each example, which lets
      transformers' models keep examples apart, by flash attention's varlen kernels or a block mask. They do so only
      without a cache: ``use_cache`` is False;
    - ``logits_to_keep`` (N,) int64, the columns that predict, and ``predicting`` (N,) int64, here 0 to N - 1;
    - ``target_ids`` (N, M) int32, ``target_weights`` (N, M) float32, ``entropy`` and ``tail_entropy`` (N,) float32
      nats, as in ``Targets``, and ``num_sampled`` (N,) int64, how many of the last columns are draws.

    Some models do not keep examples apart: ``refuse_packing`` finds out.
    """

    def __call__(self, examples: list[dict]) -> dict:
        lengths = np.array([len(example["input_ids"]) for example in examples])
        starts = np.cumsum(lengths) - lengths
        columns = np.concatenate([_predicting(one) + start for one, start in zip(examples, starts, strict=True)])
        row = {
            "input_ids": _concatenated(examples, "input_ids"),
            "labels": _concatenated(examples, "labels"),
            "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        }
        return {
            **{name: tensor[None] for name, tensor in row.items()},
            "logits_to_keep": torch.from_numpy(columns),
            "predicting": torch.arange(len(columns)),
            "use_cache": False,
            **_targets(examples),
        }


@dataclass(frozen=True)
class PaddingCollator:
    """Pads B examples of ``training_dataset`` on the right to T tokens, N of them predicted.

    A batch has

    - ``input_ids`` and ``labels`` (B, T) int64, padded with ``pad_token_id`` and -100, and ``attention_mask`` (B, T)
      int64;
    - ``logits_to_keep`` (U,) int64, the columns that predict in any example, and ``predicting`` (N,) int64, each
      target's place in the logits (B, U, V) reshaped to (B·U, V);
    - ``target_ids``, ``target_weights``, ``entropy``, ``tail_entropy`` and ``num_sampled`` as in ``PackingCollator``.
    """

    pad_token_id: int = 0

    def __call__(self, examples: list[dict]) -> dict:
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        columns = [_predicting(example) for example in examples]
        kept = np.unique(np.concatenate(columns))
        places = [i * len(kept) + np.searchsorted(kept, each) for i, each in enumerate(columns)]
        return {
            "input_ids": _padded(examples, "input_ids", self.pad_token_id),
            "labels": _padded(examples, "labels", IGNORED),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "logits_to_keep": torch.from_numpy(kept),
            "predicting": torch.from_numpy(np.concatenate(places)),
            **_targets(examples),
        }


def model_inputs(batch: dict) -> dict:
    """The model's arguments from a collator's batch; the rest is for the loss."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def _predicting(example: dict) -> np.ndarray:
    """The columns of an example, int64 (n,), whose logits predict a taught token."""
    return np.asarray(example["positions"], np.int64) - 1


def _targets(examples: list[dict]) -> dict[str, torch.Tensor]:
    counts = [len(example["positions"]) for example in examples]
    draws = np.repeat(np.array([example["num_sampled"] for example in examples], np.int64), counts)
    return {**{name: _concatenated(examples, name) for name in TARGETS}, "num_sampled": torch.from_numpy(draws)}


def _concatenated(examples: list[dict], name: str) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([example[name] for example in examples]))


def _padded(examples: list[dict], name: str, value: int) -> torch.Tensor:
    rows = [torch.as_tensor(example[name]) for example in examples]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


@torch.no_grad()
def refuse_packing(model: torch.nn.Module) -> None:
    """Raise UsageError for a model that does not keep packed examples apart.

    The second of two short packed texts must get the same logits as alone, up to rounding. It does not with state space
    and linear attention layers, which carry a state along the row, and in models that count positions along the row.
    """
    name, was_training = type(model).__name__, model.training
    model.eval()  # without dropout
    try:
        first, second = (
            torch.tensor([list(probe)], device=model.get_input_embeddings().weight.device) for probe in PROBES
        )
        positions = [torch.arange(ids.shape[1], device=ids.device)[None] for ids in (first, second)]
        alone = _logits(model, second, positions[1])
        packed = _logits(model, torch.cat([first, second], 1), torch.cat(positions, 1))
    except TypeError as error:
        raise UsageError(
            f"{name} takes no position_ids ({error}), so it cannot be packed: take PaddingCollator"
        ) from error
    finally:
        model.train(was_training)
    difference = (packed[0, first.shape[1] :] - alone[0]).abs().max()
    noise = FLOAT32_NOISE if model.dtype == torch.float32 else NOISE
    if not difference <= noise * alone.abs().max():
        raise UsageError(
            f"{name} does not keep packed conversations apart: logits of one differ by up to {difference:.2g} with "
            "what stands before it. Take PaddingCollator."
        )


def _logits(model: torch.nn.Module, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
