"""The check at start-up: what conversations may share while their logits still match the reference forward pass.

Random conversations go through ``Teacher`` as in a run: in a padded batch, read only up to the last row, with rows in
pieces, after a shared prefix. They are about 50 tokens long. A second set is long enough to exceed the windows, chunks
and the like in the config, up to ``LONGEST``; the check costs about as much as one batch. Conversations longer than a
window that was not exceeded share nothing.

Rows of logits are compared by the root mean square of their difference, in nats, over the entries that are not masked.
A correct computation in another order differs only by rounding, in proportion to the row's spread (its standard
deviation). Another position's row, wrong padding or a missing part of the model change a row by a large part of its
spread.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from chat_logits.errors import ToolkitError
from chat_logits.model.batching import Sharing
from chat_logits.model.devices import input_device
from chat_logits.model.group import group_of
from chat_logits.model.limits import most_positions
from chat_logits.model.out_of_memory import OUT_OF_MEMORY, is_out_of_memory
from chat_logits.model.reference import nudged_rows, plain_rows, rows_of_whole_layers
from chat_logits.model.teacher import Request, Teacher
from chat_logits.words import first_line

PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)  # caches that a shared prefix may be kept in
# How much a row may differ, relative to its spread: about six roundings in a deep network of random weights.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# If a model's own rows change more than that in a larger batch, or when its embeddings change by one rounding, these
# factors of that change are tolerated. Computing in another order changed rows by 0.5 to 0.8 of what the nudge did.
NOISE_FACTOR, NUDGE_FACTOR, NUDGES = 3, 1.5, 2
MOST_NOISE = 0.3  # of the spread; another position's row differs by about 1.4
NOTHING = 88.0  # nats below a row's largest logit: the probability is 0 in float32; masked entries are lower still
SHORT = 24  # tokens of the prefix of short conversations
ENDINGS = (24, 24, 12)  # tokens after it
LONGEST = {"cpu": 256, "other": 4096}  # tokens of the longest window that is exceeded: 1/3 or 1/4 of a batch
WINDOWS = re.compile("window|chunk|block_(size|len)|compress|local_(radius|attn)")
BLOCKS = re.compile("block_(size|len)|compress")
COUNTED = re.compile(r"layer|pattern|head|rope|theta|expert|group")  # numbers under such keys are not lengths


class Conversations(NamedTuple):
    """Three random conversations with a common ``prefix``, two of equal length; and one with only ``early`` rows."""

    prefix: np.ndarray
    sharing: list[Request]
    early: Request

    @property
    def all(self) -> list[Request]:
        return [*self.sharing, self.early]


# How the batches of each kind of sharing hold the conversations of ``all``, and whether these are read to their ends.
BATCHES: dict[str, tuple[list[slice], bool]] = {
    "padded": ([slice(0, 3), slice(3, 4)], False),
    "equal": ([slice(0, 2), slice(2, 3), slice(3, 4)], True),
    "alone": ([slice(i, i + 1) for i in range(4)], True),
}


def probe_model(model) -> Sharing:
    """What conversations may share with this model. Raises ToolkitError if even one alone gives other logits.

    Also raised if a model is not causal, or its forward pass needs more than token ids.
    """
    try:
        return _probe(model)
    except ToolkitError:
        raise
    except Exception as error:
        raise _fails(model, error) from error


def named_windows(config) -> list[int]:
    """Lengths, in tokens, at which a model's attention may change its behaviour, found by names in its config."""
    text = config.get_text_config()
    chosen, others = _named(text, re.compile("topk")), _named(text, WINDOWS)
    blocks = _named(text, BLOCKS)  # blocks of several tokens each, some of which are chosen
    found = chosen | others | {number * size for number in chosen for size in blocks}
    reached = most_positions(text)
    return sorted(each for each in found if reached is None or each < reached)


def _named(text_config, names: re.Pattern) -> set[int]:
    """The integers above 1 under keys that match these names."""
    found: set[int] = set()
    for key, value in text_config.to_dict().items():
        if names.search(key) and not COUNTED.search(key):
            values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            found |= {each for each in values if type(each) is int and each > 1}
    return found


def row_differences(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of each row of logits (n, V), in nats (n,), over entries not masked in both.

    Infinite if the shapes differ, NaN for logits that are NaN.
    """
    if found.shape != expected.shape:
        return expected.new_full(expected.shape[:1], torch.inf)
    floor = expected.amax(dim=-1, keepdim=True) - NOTHING
    counted = ((expected > floor) | (found > floor)).sum(dim=-1)
    squares = (torch.maximum(found, floor) - torch.maximum(expected, floor)).square().sum(dim=-1)
    return (squares / counted).sqrt()


def row_limits(expected: torch.Tensor, tolerance: float, dtype: torch.dtype) -> torch.Tensor:
    """How much each row of logits (n, V) may differ, in nats (n,): a share of its spread, plus the final rounding."""
    counted = expected > expected.amax(dim=-1, keepdim=True) - NOTHING
    number = counted.sum(dim=-1)
    mean = expected.where(counted, 0).sum(dim=-1, keepdim=True) / number[:, None]
    spread = ((expected - mean).square().where(counted, 0).sum(dim=-1) / number).sqrt()
    return tolerance * spread + torch.finfo(dtype).eps * expected.where(counted, 0).abs().amax(dim=-1)


@torch.inference_mode()
def _probe(model) -> Sharing:
    windows, device = named_windows(model.config), input_device(model).type
    longest = LONGEST.get(device, LONGEST["other"])
    passed = max((each for each in windows if each <= longest), default=0)
    conversations = _conversations(model, SHORT)
    expected = _reference_rows(model, conversations.all)
    tolerance = _tolerance(model, conversations.all[0], expected)
    if group_of(model):
        _refuse_wrong_parts(model, conversations.all[0], expected, tolerance)
    sharing = _sharing(model, conversations, expected, tolerance)
    if passed > SHORT - 4:
        try:
            conversations = _conversations(model, passed + 8)
            expected = _rows(model, conversations, "alone")
            sharing = sharing.less(_sharing(model, conversations, expected, tolerance))
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            passed = 0
    return sharing.less(Sharing(up_to=min((each for each in windows if each > max(passed, SHORT)), default=None)))


def _conversations(model, shared: int) -> Conversations:
    """Conversations with a prefix of ``shared`` tokens; the early rows are in its first half."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    random = np.random.default_rng(0)
    prefix = random.integers(0, vocabulary, shared)
    texts = [np.concatenate([prefix, random.integers(0, vocabulary, more)]) for more in ENDINGS]
    sharing = [_request(ids, shared + 1, len(ids) - 4) for ids in texts]
    return Conversations(prefix, sharing, _request(texts[0], max(1, shared // 2 - 16), shared // 2))


def _request(ids: np.ndarray, first: int, end: int) -> Request:
    return Request(ids, np.arange(first, end), np.zeros(end - first))


def _reference_rows(model, requests: list[Request]) -> torch.Tensor:
    return torch.cat([plain_rows(model, request.input_ids[None], 0, request.positions) for request in requests])


def _tolerance(model, request: Request, expected: torch.Tensor) -> float:
    """How much rows may differ, relative to their spread: by the dtype, or by the model's own noise if that is more.

    The noise is the change of the reference forward pass itself, in two tests: when a batch holds a conversation three
    times, which shows nothing with kernels that round alike in any batch; and when its embeddings change by one
    rounding, which works with all kernels.
    """
    least = TOLERANCE.get(model.dtype, max(TOLERANCE.values()))
    if model.dtype not in (torch.float16, torch.bfloat16):
        return least
    ids, alone = request.input_ids[None], expected[: len(request.positions)]
    limits = row_limits(alone, 1.0, model.dtype)

    def most(found: torch.Tensor) -> float:
        return (row_differences(found, alone) / limits).nan_to_num(0).max().item()  # NaN rows are refused anyway

    noise = NOISE_FACTOR * most(plain_rows(model, np.tile(ids, (3, 1)), 1, request.positions))
    nudged = (nudged_rows(model, ids, 0, request.positions, seed) for seed in range(NUDGES))
    return max(least, min(MOST_NOISE, max(noise, *(NUDGE_FACTOR * most(found) for found in nudged))))


def _refuse_wrong_parts(model, request: Request, expected: torch.Tensor, tolerance: float) -> None:
    """Raise ToolkitError if the parts of a split model together give other rows than its whole layers."""
    found = expected[: len(request.positions)]
    plain = rows_of_whole_layers(model, request.input_ids[None], 0, request.positions)
    differences, limits = row_differences(found, plain), row_limits(plain, tolerance, model.dtype)
    if not (differences <= limits).all():
        worst = (differences / limits).nan_to_num(torch.inf).argmax()
        raise ToolkitError(
            f"model check: split over processes, logits differ from those of whole layers by {differences[worst]:.3g} "
            f"nats (root mean square of a row), expected at most {limits[worst]:.3g}. Nothing was extracted; use "
            "`device_map` auto instead of `tensor_parallel`."
        )


def _sharing(model, conversations: Conversations, expected: torch.Tensor, tolerance: float) -> Sharing:
    """The most that these conversations may share. Raises ToolkitError if the model must not be used."""
    limits = row_limits(expected, tolerance, model.dtype)
    excess = {}
    for batch in BATCHES:
        differences = _differences(partial(_rows, model, conversations, batch), expected)
        if (differences <= limits).all():
            break
        worst = (differences / limits).nan_to_num(torch.inf).argmax()
        excess[batch] = differences[worst].item(), limits[worst].item()
    else:
        raise _refusal(expected, *excess["alone"])
    if batch != "padded":
        _refuse_foresight(model, conversations.early, tolerance)
    prefix = batch == "padded" and _cache_agrees(model, conversations, expected, limits)
    return Sharing(batch, prefix, None, limits.max().item())


def _rows(model, conversations: Conversations, batch: str) -> torch.Tensor:
    """The rows of ``conversations.all`` as a run computes them; in pieces, except for a conversation alone."""
    slices, whole = BATCHES[batch]
    teacher = Teacher(model, logit_rows=1000 if batch == "alone" else 7)
    teacher.reads_whole |= whole
    return torch.cat([_row_logits(teacher, conversations.all[part]) for part in slices])


def _row_logits(teacher: Teacher, requests: list[Request]) -> torch.Tensor:
    return torch.cat(teacher.row_logits(requests)).float()


def _differences(compute: Callable[[], torch.Tensor], expected: torch.Tensor) -> torch.Tensor:
    """Infinite if the computation fails, as some models do with a batch or a cache; lack of memory is raised."""
    try:
        return row_differences(compute(), expected)
    except ToolkitError:  # a group of processes is lost
        raise
    except Exception as error:
        if isinstance(error, OUT_OF_MEMORY) and is_out_of_memory(error):
            raise
        return expected.new_full(expected.shape[:1], torch.inf)


def _cache_agrees(model, conversations: Conversations, expected: torch.Tensor, limits: torch.Tensor) -> bool:
    """Whether the model has a plain key-value cache that fits in memory, and the rows after a prefix agree."""
    count = sum(len(request.positions) for request in conversations.sharing)

    def compute() -> torch.Tensor:
        teacher = Teacher(model, logit_rows=7)
        teacher.hold_prefix(conversations.prefix)
        if not teacher.holds_plain_cache(PLAIN_LAYERS):
            return expected.new_empty(0)
        return _row_logits(teacher, conversations.sharing)

    try:
        return bool((_differences(compute, expected[:count]) <= limits[:count]).all())
    except OUT_OF_MEMORY:
        return False


def _refuse_foresight(model, early: Request, tolerance: float) -> None:
    """Raise ToolkitError if rows change with later tokens while the length stays the same."""
    others = early.input_ids.copy()
    others[early.positions[-1] :] = np.roll(others[early.positions[-1] :], 1)
    teacher = Teacher(model, logit_rows=1000)
    teacher.reads_whole = True
    expected, found = (_row_logits(teacher, [early.with_ids(ids)]) for ids in (early.input_ids, others))
    if not (row_differences(found, expected) <= row_limits(expected, tolerance, model.dtype)).all():
        raise ToolkitError(
            "model check: the logits change when later tokens change, so the model is not causal. "
            "Expected a causal model; a BERT-like model is causal only with is_decoder in its config.json."
        )


def _refusal(expected: torch.Tensor, difference: float, limit: float) -> ToolkitError:
    if torch.isnan(expected).any() or (expected == torch.inf).any() or (expected == -torch.inf).all(dim=-1).any():
        return ToolkitError("model check: the model's logits are not finite; try `dtype` float32")
    return ToolkitError(
        f"model check: logits of selected rows differ from the reference forward pass by {difference:.3g} nats "
        f"(root mean square of a row), expected at most {limit:.3g}. Nothing was extracted; try `attn_implementation` "
        "eager or `dtype` float32."
    )


def _fails(model, error: Exception) -> ToolkitError:
    if isinstance(error, OUT_OF_MEMORY) and is_out_of_memory(error):
        others = "more devices (`tensor_parallel`)" if group_of(model) else "several (`tensor_parallel`, `device_map`)"
        ways = f"a smaller `dtype`, a larger device, or {others}"
        return ToolkitError(f"model check: out of memory with four short conversations; use {ways}")
    return ToolkitError(
        f"model check: the forward pass over token ids alone fails ({type(error).__name__}: {first_line(error)}). "
        "Expected a model of text; try `attn_implementation` eager."
    )
