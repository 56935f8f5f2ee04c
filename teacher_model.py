"""The model's side: token ids and positions to nucleus, tail draws, logsumexp and real-token log-probabilities.

Only the rows of the hidden state that predict an extracted token meet the vocabulary matrix, by a pre-hook on the
model's own output embedding, so that whatever the model does to its logits afterwards is done to these.
"""

from dataclasses import dataclass

import numpy as np
import torch

from errors import ToolkitError, UsageError
from hub_access import explain_hub_error
from logit_codec import ABSENT, MAX_TOKEN_ID, Distributions

BLOCK = 256  # vocabulary entries that are summed in float32 before totals go on in float64
# What a probe's logits may differ by, relative to the largest: half a dozen roundings of the dtype.
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Request:
    """One conversation: ``input_ids`` (T,), extracted ``positions`` (n,), ``uniforms`` (n,) in [0, 1)."""

    input_ids: np.ndarray
    positions: np.ndarray
    uniforms: np.ndarray


# --- loading ---


def choose_device(name: str | None) -> torch.device:
    """``--device``, by default the first accelerator there is. Raises UsageError for one that is not there."""
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"--device {name}: {reason}. Available: {', '.join(_devices())}.") from error
    return device


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    return ["cpu", *(f"{accelerator.type}:{i}" for i in range(count))]


def load_config(model_id: str, revision: str | None = None, gguf_file: str | None = None):
    """The model's configuration, without its weights."""
    from transformers import AutoConfig

    return _load(AutoConfig, model_id, revision, gguf_file)


def load_teacher(
    model_id: str,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
):
    """A causal LM in evaluation mode. ``dtype`` "auto" is float32 on a CPU and the model's own elsewhere."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": "float32" if dtype == "auto" and torch.device(device).type == "cpu" else dtype}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    model = _load(AutoModelForCausalLM, model_id, revision, gguf_file, **options)
    if model.get_output_embeddings() is None:
        raise ToolkitError(f"model {model_id}: it has no output embedding, so it predicts no tokens")
    return model.eval().to(device)


def _load(auto_class, model_id: str, revision: str | None, gguf_file: str | None, **options):
    if gguf_file:
        options["gguf_file"] = gguf_file
    try:
        return auto_class.from_pretrained(model_id, revision=revision, **options)
    except ImportError as error:
        needs = "requirements-dev.txt has gguf and accelerate, which GGUF files need" if gguf_file else str(error)
        raise ToolkitError(f"model {model_id}: {needs}") from error
    except Exception as error:
        raise explain_hub_error(error, f"model {model_id}") from error


@dataclass(frozen=True)
class InputLimits:
    """What the model can read: ids below ``vocab_size``, and at most ``positions`` tokens (None: no limit named)."""

    vocab_size: int
    positions: int | None


def input_limits(config) -> InputLimits:
    """The limits that a model's configuration names."""
    text = config.get_text_config()
    return InputLimits(text.vocab_size, getattr(text, "max_position_embeddings", None))


# --- forward ---


@torch.inference_mode()
def row_logits(model, requests: list[Request]) -> torch.Tensor:
    """Float32 logits (R, V) that predict the requests' extracted tokens, in order; R is all positions together.

    Pads on the right, so that positions count from 0 without a position argument.
    """
    lengths = [len(request.input_ids) for request in requests]
    ids = torch.zeros(len(requests), max(lengths), dtype=torch.long)
    for i, request in enumerate(requests):
        ids[i, : lengths[i]] = torch.from_numpy(request.input_ids)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    sample = torch.from_numpy(np.repeat(np.arange(len(requests)), [len(r.positions) for r in requests]))
    before = torch.from_numpy(np.concatenate([r.positions for r in requests])) - 1

    def keep_rows(_module, args):
        hidden = args[0]
        return (hidden[sample.to(hidden.device), before.to(hidden.device)].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep_rows)
    try:
        output = model(input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device), use_cache=False)
    finally:
        handle.remove()
    return output.logits[0].float()


def distributions(model, requests: list[Request], top_k: int, top_p: float, num_sampled: int) -> Distributions:
    """What the model says at every extracted position of the requests, one after another."""
    logits = row_logits(model, requests)
    tokens = torch.from_numpy(np.concatenate([r.input_ids[r.positions] for r in requests])).to(logits.device)
    uniforms = torch.from_numpy(np.concatenate([r.uniforms for r in requests])).to(logits.device)
    return select(logits, tokens, uniforms, top_k, top_p, num_sampled)


def probe(model) -> None:
    """Compare ``row_logits`` on a padded batch with the plain forward; raise ToolkitError if they differ."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = np.random.default_rng(0).integers(0, vocabulary, 24)
    requests = [Request(part, np.arange(1, len(part)), np.zeros(len(part) - 1)) for part in (ids[:9], ids[9:])]
    found = row_logits(model, requests)
    with torch.inference_mode():
        plain = [model(torch.from_numpy(r.input_ids)[None].to(model.device)).logits[0, :-1] for r in requests]
    expected = torch.cat(plain).float()
    difference = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
    limit = PROBE_TOLERANCE.get(model.dtype, 6e-2) * max(1.0, expected.abs().max().item())
    if not difference <= limit:
        raise ToolkitError(
            f"model check: logits of selected rows differ from the plain forward by {difference:.3g}, expected at "
            f"most {limit:.3g}. Nothing was extracted; try --attn_implementation eager or --dtype float32."
        )


# --- selection ---


@torch.inference_mode()
def select(
    logits: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor, top_k: int, top_p: float, num_sampled: int
) -> Distributions:
    """Nucleus, tail draws, logsumexp and real-token log-probabilities of float32 logits (R, V).

    ``tokens`` (R,) int64 are the real tokens, ``uniforms`` (R,) float64. The logits are overwritten. The rules are
    FORMAT.md's, "What is stored at a position"; ``logit_codec`` has the plain reference.
    """
    storable = min(logits.shape[1], MAX_TOKEN_ID)
    top_values, top_ids = logits[:, :storable].topk(min(top_k, storable))
    real = logits.gather(1, tokens[:, None])[:, 0].double()
    highest = logits.amax(dim=1, keepdim=True)
    mass = logits.sub_(highest).exp_()
    blocks = _block_sums(mass)
    logsumexp = highest[:, 0].double() + blocks.sum(dim=1).log()
    if not torch.isfinite(logsumexp).all():
        raise ToolkitError("the model's logits are not finite; try --dtype float32")
    top_probs = (top_values.double() - logsumexp[:, None]).exp()
    kept = _nucleus_cut(top_probs, top_p) & torch.isfinite(top_values)
    mass.scatter_(1, top_ids, mass.gather(1, top_ids) * ~kept)
    sampled_ids, sampled_mass = _draw_tail(mass[:, :storable], uniforms, num_sampled)
    missing = top_k - top_ids.shape[1]
    arrays = {
        "top_ids": torch.nn.functional.pad(top_ids.where(kept, ABSENT), (0, missing), value=ABSENT),
        "top_probs": torch.nn.functional.pad(top_probs * kept, (0, missing)),
        "sampled_ids": sampled_ids,
        "sampled_probs": sampled_mass * (highest.double() - logsumexp[:, None]).exp(),
        "logsumexp": logsumexp,
        "token_log_probs": real - logsumexp,
    }
    return Distributions(**{name: array.cpu().numpy() for name, array in arrays.items()})


def _nucleus_cut(top_probs: torch.Tensor, top_p: float) -> torch.Tensor:
    if top_p >= 1:
        return torch.ones_like(top_probs, dtype=torch.bool)
    before = torch.nn.functional.pad(top_probs.cumsum(dim=1)[:, :-1], (1, 0))
    return before < top_p


def _block_sums(mass: torch.Tensor) -> torch.Tensor:
    """Sums over blocks of ``BLOCK`` columns, float64 (R, ceil(V / BLOCK)); within a block in float32."""
    whole = mass.shape[1] // BLOCK * BLOCK
    sums = mass[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=2) if whole else mass[:, :0]
    if whole < mass.shape[1]:
        sums = torch.cat([sums, mass[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    return sums.double()


def _draw_tail(mass: torch.Tensor, uniforms: torch.Tensor, num_sampled: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Systematic draws from the mass (R, V) that is left: ids int64 and mass float64, both (R, S).

    Two searches: for the block that a threshold falls into, then within that block.
    """
    sums = _block_sums(mass)
    running = sums.cumsum(dim=1)
    steps = torch.arange(num_sampled, device=mass.device, dtype=torch.float64)
    thresholds = (uniforms[:, None] + steps) / max(1, num_sampled) * running[:, -1:]
    # A threshold that rounding puts past the end takes the last block, and below the last id, with mass.
    order = torch.arange(sums.shape[1], device=mass.device)
    last_block = ((sums > 0) * order).amax(dim=1, keepdim=True)
    block = torch.minimum(torch.searchsorted(running, thresholds, right=True), last_block)
    column = block[:, :, None] * BLOCK + torch.arange(BLOCK, device=mass.device)
    inside = mass.gather(1, column.clamp(max=mass.shape[1] - 1).flatten(1)).unflatten(1, (num_sampled, BLOCK))
    inside = (inside * (column < mass.shape[1])).double()
    within = (running - sums).gather(1, block)[:, :, None] + inside.cumsum(dim=2)
    offset = (within <= thresholds[:, :, None]).sum(dim=2)
    last = ((inside > 0) * torch.arange(BLOCK, device=mass.device)).amax(dim=2)
    ids = block * BLOCK + torch.minimum(offset, last)
    drawn = running[:, -1:] > 0
    return ids.where(drawn, ABSENT), mass.gather(1, ids).double() * drawn
