"""Verify a stored logit dataset against the live model, by reference forward passes, one conversation at a time.

row -> its tokens -> the model's output -> differences, column by column -> the cause
"""

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from chat_logits.analysis.bars import bar
from chat_logits.analysis.opening import recorded_place
from chat_logits.analysis.reference_output import IN_PLACE, SHIFTS, dtype_name
from chat_logits.analysis.row_check import KL_LIMITS, POSITION_FACTOR, RowCheck, check_row
from chat_logits.data.hashing import hash_files
from chat_logits.data.row_alignment import AlignmentError, RowAligner
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub import is_commit
from chat_logits.model.config import refuse_device_with_map
from chat_logits.scratch import scratch_folder
from chat_logits.stages import stage
from chat_logits.storage.dataset import DamagedRow, StoredDataset
from chat_logits.storage.manifest import Manifest
from chat_logits.storage.shard import DamagedShard
from chat_logits.words import count_text

logger = logging.getLogger(__name__)

CLEARLY = 2  # errors in place must be smaller by this factor than those one position off
NEARLY_ALL = 0.9  # if this share of the rows is wrong, the model is probably another one
FIGURES = ("kl_mean", "kl_row", "kl_position", "logsumexp", "token_log_probs", "in_order")


@dataclass(frozen=True, repr=False)
class Verification:
    """The stored numbers of ``num_rows`` rows against a model's own.

    ``figures`` are in nats, except ``in_order``, a share of the positions: ``kl_mean`` is the mean over all positions,
    ``kl_row`` the largest mean of a row, ``kl_position`` the largest of a position; ``logsumexp`` and
    ``token_log_probs`` are the differences nearest to their limits, or furthest beyond. ``limits`` has the same keys
    except ``kl_mean``. ``shifts`` has the mean errors of "kl", "logsumexp" and "token_log_probs" against the output one
    position earlier, in place, and one later. Each of ``causes`` is a line about a row or about all rows. Figures are
    NaN if no row could be compared with the model.
    """

    dataset_id: str
    model_id: str
    dtype: str
    device: str
    num_rows: int
    num_tokens: int
    figures: dict[str, float]
    limits: dict[str, float]
    shifts: dict[str, list[float]]
    causes: list[str]

    @property
    def holds(self) -> bool:
        return not self.causes

    def __repr__(self) -> str:
        counts = f"{count_text(self.num_rows, 'conversation')}, {count_text(self.num_tokens, 'token')}"
        return f"<Verification of {self.dataset_id}: {counts}, {'holds up' if self.holds else 'does not hold up'}>"

    def as_dict(self) -> dict:
        """All of it as plain values, and whether it holds."""
        content = asdict(self)
        return {"logit_dataset_id": content.pop("dataset_id"), **content, "holds": self.holds}


def verify(
    dataset: StoredDataset,
    tokenizer,
    count: int,
    model_id: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    device_map: str | None = None,
) -> Verification:
    """Compare ``count`` rows, spread evenly over the dataset, with the model that they were extracted from.

    The model is the recorded one, or the one at ``model_id`` (a folder or a Hub id), on the first accelerator, on
    ``device``, or spread by ``device_map``; ``chat_template`` is as for ``align_row``. Raises ToolkitError if the model
    cannot be loaded or has another vocabulary, UsageError if that is the model at ``model_id``; any other difference is
    among the causes.
    """
    if count < 1:
        raise UsageError(f"`verify` {count}: expected 1 row or more")
    dataset.refuse_empty()
    with scratch_folder() if device_map else nullcontext() as offload_folder:
        model = load_recorded_model(dataset, model_id, trust_remote_code, device, device_map, offload_folder)
        return check_rows(dataset, model, tokenizer, spread(dataset.num_rows, count), chat_template)


def spread(num_rows: int, count: int) -> list[int]:
    """``count`` row numbers, spread evenly from the first to the last, or all if there are fewer.

    >>> spread(10, 4), spread(2, 4)
    ([0, 3, 6, 9], [0, 1])
    """
    count = min(count, num_rows)
    return [i * (num_rows - 1) // max(1, count - 1) for i in range(count)]


def load_recorded_model(
    dataset: StoredDataset,
    model_id: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    device_map: str | None = None,
    offload_folder: Path | None = None,
):
    """The model of ``extraction.json`` in its dtype and attention, from its recorded place or from ``model_id``.

    ``device``, ``device_map`` and ``offload_folder`` are as for ``load_model``.
    """
    with stage("Importing torch and transformers"):
        from chat_logits.model.devices import choose_device
        from chat_logits.model.loading import load_model
        from chat_logits.model.quantization import option_of

    source, revision = recorded_place(dataset, model_id, "model_id")
    manifest = dataset.manifest
    dtype = manifest.dtype
    if dtype not in KL_LIMITS:
        raise ToolkitError(f"extraction.json has dtype {dtype[:40]!r}, expected one of {', '.join(KL_LIMITS)}")
    refuse_device_with_map(device, device_map)
    found = choose_device(device)
    shown = "".join(character if character.isprintable() else "\ufffd" for character in source)
    base = manifest.base_revision if is_commit(manifest.base_revision or "") else None
    with stage("Loading %s %s", shown, "over all devices" if device_map else f"on {found}"):
        model = load_model(
            source,
            revision,
            gguf_file=manifest.gguf_file,
            dtype=dtype,
            device=found,
            device_map=device_map,
            offload_folder=offload_folder,
            attn_implementation=manifest.attn_implementation,
            trust_remote_code=trust_remote_code,
            base_revision=base,
            head_dtype=manifest.head_dtype,
            quantization=option_of(manifest.quantization),
        )
    vocab_size = model.get_output_embeddings().weight.shape[0]
    if vocab_size != manifest.vocab_size:
        raise (UsageError if model_id else ToolkitError)(
            f"model {source}: a vocabulary of {vocab_size}, expected {manifest.vocab_size}; it is not the model "
            f"extracted from, which was {manifest.model_id} at {manifest.model_revision[:12]}. Name another with "
            "`model_id`."
        )
    return model


def check_rows(
    dataset: StoredDataset, model, tokenizer, indices: Sequence[int], chat_template: str | None = None
) -> Verification:
    """Compare these rows with a loaded model, with a progress bar on stderr."""
    from chat_logits.model.devices import input_device

    checks, causes = _check_each(dataset, model, RowAligner(tokenizer, dataset.manifest, chat_template), indices)
    figures, limits, shifts = _figures(checks)
    causes += _causes(checks, dataset.manifest, model.name_or_path)
    return Verification(
        dataset_id=dataset.dataset_id,
        model_id=model.name_or_path,
        dtype=dtype_name(model),
        device=str(input_device(model)),
        num_rows=len(indices),
        num_tokens=sum(len(check.in_order) for check in checks),
        figures=figures,
        limits=limits,
        shifts=shifts,
        causes=causes or _undecided(shifts),
    )


def _check_each(
    dataset: StoredDataset, model, aligner: RowAligner, indices: Sequence[int]
) -> tuple[list[RowCheck], list[str]]:
    """The checks of the rows, and a line for each row that cannot be checked."""
    checks, causes = [], []
    for index in bar(indices, unit=" conversations", dynamic_ncols=True):
        try:
            row = dataset.read_row(index)
            alignment = aligner.align(row, index)
        except (DamagedRow, AlignmentError) as error:  # which name the row
            causes.append(str(error))
        except DamagedShard as error:
            causes.append(f"row {index}: {error}")
        else:
            checks.append(check_row(index, row, alignment, model, dataset.manifest))
    return checks, causes


# --- the rows together ---


def _figures(checks: list[RowCheck]) -> tuple[dict, dict, dict]:
    """Figures, their limits, and the mean errors at SHIFTS, as in ``Verification``."""
    names = ("kl", "logsumexp", "token_log_probs")
    if not checks:
        return dict.fromkeys(FIGURES, math.nan), {}, dict.fromkeys(names, [math.nan] * len(SHIFTS))
    errors = {name: np.concatenate([check.errors[name] for check in checks], axis=1) for name in names}
    limit = checks[0].kl_limit
    figures = {
        "kl_mean": errors["kl"][IN_PLACE].mean(),
        "kl_row": max(check.errors["kl"][IN_PLACE].mean() for check in checks),
        "kl_position": errors["kl"][IN_PLACE].max(),
    }
    limits = {"kl_row": limit, "kl_position": POSITION_FACTOR * limit}
    for name in names[1:]:
        largest = [(check.errors[name][IN_PLACE].max(), check.tolerance) for check in checks]
        figures[name], limits[name] = max(largest, key=lambda pair: pair[0] / pair[1])
    figures["in_order"], limits["in_order"] = np.concatenate([check.in_order for check in checks]).mean(), 1.0
    shifts = {name: each.mean(axis=1).tolist() for name, each in errors.items()}
    return {name: float(figure) for name, figure in figures.items()}, limits, shifts


def _causes(checks: list[RowCheck], manifest: Manifest, source: str) -> list[str]:
    """A line for each row with faults, or one line for all of them if the model is probably another one."""
    faulty = [check for check in checks if check.faults]
    strangers = [check for check in faulty if check.is_all_wrong]
    if not strangers or len(strangers) < NEARLY_ALL * len(checks):
        return [check.cause for check in faulty]
    rows = f"{len(strangers)} of {count_text(len(checks), 'row')}"
    cause = f"wrong throughout, {rows}: {_other_model(manifest, source)}"
    return [cause, *(check.cause for check in faulty if not check.is_all_wrong)]


def _other_model(manifest: Manifest, source: str) -> str:
    recorded = manifest.model_revision
    was = f"the model is probably not the one extracted from, {manifest.model_id} at {recorded[:12]}"
    if is_commit(recorded) or not Path(source).exists():
        return was
    files = hash_files(source)
    if files == recorded:
        return f"{was}, though its files are: compare the versions with extraction.json's"
    return f"{was}; the files of {source} are others ({files[:12]})"


def _undecided(shifts: dict[str, list[float]]) -> list[str]:
    """A cause for each number that the shift test cannot show to be in place."""
    return [
        f"{name}: {in_place:.2g} nats off in place, {before:.2g} one position earlier, {after:.2g} one later; expected "
        "in place clearly best. Check more rows."
        for name, (before, in_place, after) in shifts.items()
        if not CLEARLY * in_place <= min(before, after)
    ]
