"""From logits to nucleus, tail draws, logsumexp and target-token log-probabilities, on the device of the logits.

On CUDA ``selection_kernel`` reads the logits once, as they are. Elsewhere they are converted to float32 and processed
in place: top K, exponentials, sums over blocks for total and tail, draws by two searches. FORMAT.md, "What is
stored at a position", has the rules; ``logit_codec`` has the plain reference.
"""

import functools
import importlib.util
import logging
from dataclasses import dataclass

import torch

from chat_logits.model.out_of_memory import is_out_of_memory
from chat_logits.words import first_line
from logit_codec import ABSENT, MAX_TOKEN_ID, Distributions

logger = logging.getLogger(__name__)

BLOCK = 128  # vocabulary entries that are summed in float32; the sums of blocks are added in float64
DRAWN_ROWS = 64  # rows searched for draws at once, so that the search's data stays in the cache


@dataclass(frozen=True)
class SelectionSettings:
    """What is stored at a position: at most ``top_k`` entries up to ``top_p``, and ``num_sampled`` draws."""

    top_k: int
    top_p: float
    num_sampled: int


@torch.inference_mode()
def select(
    logits: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor, settings: SelectionSettings
) -> dict[str, torch.Tensor]:
    """The fields of ``Distributions`` as tensors on the logits' device. The logits (R, V) may be overwritten.

    ``tokens`` (R,) int64 are the target tokens, ``uniforms`` (R,) float64. Nothing here synchronizes with the host.
    """
    if logits.is_cuda and has_kernel(logits.device, logits.dtype, logits.shape[1], settings):
        from chat_logits.model import selection_kernel  # Triton has no build for some platforms

        return selection_kernel.select(logits, tokens, uniforms, settings)
    return _select_in_place(logits.float(), tokens, uniforms, settings)


@functools.cache
def has_kernel(device: torch.device, dtype: torch.dtype, vocabulary: int, settings: SelectionSettings) -> bool:
    """Whether Triton's kernel runs there, tried on one row. If it does not although Triton is installed, a warning
    says why: Triton needs a C compiler and Python's headers, which small containers lack."""
    if importlib.util.find_spec("triton") is None:
        return False
    from chat_logits.model import selection_kernel

    row = torch.zeros(1, vocabulary, dtype=dtype, device=device)
    try:
        selection_kernel.select(row, row[0, :1].long(), row[0, :1].double(), settings)
    except Exception as error:  # from Triton, from the compiler, or because the card is too old
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        logger.warning(
            "Selection is in plain torch, which is slower: Triton's kernel does not run on %s (%s). It needs a C "
            "compiler (gcc) and Python's headers (python3-dev).",
            device,
            first_line(error),
        )
        return False
    return True


def _select_in_place(
    logits: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor, settings: SelectionSettings
) -> dict[str, torch.Tensor]:
    storable = min(logits.shape[1], MAX_TOKEN_ID)
    top_values, top_ids = logits[:, :storable].topk(min(settings.top_k, storable))
    target = logits.gather(1, tokens[:, None])[:, 0].double()
    # The largest logit is the first of the top, unless the vocabulary continues past the storable ids.
    highest = top_values[:, :1] if storable == logits.shape[1] else logits.amax(dim=1, keepdim=True)
    mass = logits.sub_(highest).exp_()
    sums = block_sums(mass)
    logsumexp = highest[:, 0].double() + sums.sum(dim=1).log()
    top_probs = (top_values.double() - logsumexp[:, None]).exp()
    kept = nucleus_cut(top_probs, settings.top_p) & torch.isfinite(top_values)
    mass.scatter_(1, top_ids, mass.gather(1, top_ids) * ~kept)
    sampled_ids, sampled_mass = _draw_tail(mass[:, :storable], uniforms, settings.num_sampled)
    missing = settings.top_k - top_ids.shape[1]
    return {
        "top_ids": torch.nn.functional.pad(top_ids.where(kept, ABSENT), (0, missing), value=ABSENT),
        "top_probs": torch.nn.functional.pad(top_probs * kept, (0, missing)),
        "sampled_ids": sampled_ids,
        "sampled_probs": sampled_mass * (highest.double() - logsumexp[:, None]).exp(),
        "logsumexp": logsumexp,
        "token_log_probs": target - logsumexp,
    }


class PendingDistributions:
    """A batch's results, being copied to the host: on a GPU through pinned memory, while the next batch is computed."""

    def __init__(self, pieces: list[dict[str, torch.Tensor]]):
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        self._arrived = None
        if joined["logsumexp"].is_cuda:
            self._tensors = {
                name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
                for name, tensor in joined.items()
            }
            self._arrived = torch.cuda.Event(blocking=True)  # threads that wait for it leave their core alone
            self._arrived.record(torch.cuda.current_stream(joined["logsumexp"].device))
        else:
            self._tensors = {name: tensor.cpu() for name, tensor in joined.items()}

    def wait(self) -> Distributions:
        """The distributions as NumPy arrays; ``logsumexp`` is not finite where the model's logits were not."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return Distributions(**{name: tensor.numpy() for name, tensor in self._tensors.items()})


def nucleus_cut(top_probs: torch.Tensor, top_p: float) -> torch.Tensor:
    if top_p >= 1:
        return torch.ones_like(top_probs, dtype=torch.bool)
    before = torch.nn.functional.pad(top_probs.cumsum(dim=1)[:, :-1], (1, 0))
    return before < top_p


def block_sums(mass: torch.Tensor) -> torch.Tensor:
    """Sums over blocks of ``BLOCK`` columns, float64 (R, ceil(V / BLOCK)); within a block in float32."""
    whole = mass.shape[1] // BLOCK * BLOCK
    sums = mass[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=2) if whole else mass[:, :0]
    if whole < mass.shape[1]:
        sums = torch.cat([sums, mass[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    return sums.double()


def _draw_tail(mass: torch.Tensor, uniforms: torch.Tensor, num_sampled: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Systematic draws from the remaining mass (R, V): ids int64 and mass float64, both (R, S)."""
    ids, masses = [], []
    for rows, some in zip(mass.split(DRAWN_ROWS), uniforms.split(DRAWN_ROWS), strict=True):
        sums = block_sums(rows)
        running = sums.cumsum(dim=1)
        found, drawn = search(rows, sums, running, draw_thresholds(some, running[:, -1:], num_sampled))
        ids.append(found.where(running[:, -1:] > 0, ABSENT))
        masses.append(drawn * (running[:, -1:] > 0))
    return torch.cat(ids), torch.cat(masses)


def draw_thresholds(uniforms: torch.Tensor, total: torch.Tensor, num_sampled: int) -> torch.Tensor:
    """What the draws' running totals have to exceed, float64 (R, S), for uniforms (R,) and total masses (R, 1)."""
    steps = torch.arange(num_sampled, device=uniforms.device, dtype=torch.float64)
    return (uniforms[:, None] + steps) / max(1, num_sampled) * total


def search(
    mass: torch.Tensor, sums: torch.Tensor, running: torch.Tensor, thresholds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of the mass (R, V) at which the running total passes the thresholds (R, S), and the mass there.

    Two searches for each threshold: for its block, then within that block. ``sums`` float64 (R, B) are the sums of the
    blocks, and ``running`` the total after each block, including what precedes the first. Returns int64 and float64,
    both (R, S).
    """
    # A threshold that rounding puts past the end gets the last block with mass, and within it the last id with mass.
    order = torch.arange(sums.shape[1], device=mass.device)
    last_block = ((sums > 0) * order).amax(dim=1, keepdim=True)
    block = torch.minimum(torch.searchsorted(running, thresholds, right=True), last_block)
    column = block[:, :, None] * BLOCK + torch.arange(BLOCK, device=mass.device)
    inside = mass.gather(1, column.clamp(max=mass.shape[1] - 1).flatten(1)).unflatten(1, (-1, BLOCK))
    inside = (inside * (column < mass.shape[1])).double()
    within = (running - sums).gather(1, block)[:, :, None] + inside.cumsum(dim=2)
    offset = (within <= thresholds[:, :, None]).sum(dim=2)
    last = ((inside > 0) * torch.arange(BLOCK, device=mass.device)).amax(dim=2)
    ids = block * BLOCK + torch.minimum(offset, last)
    return ids, mass.gather(1, ids).double()
