"""Selection as two Triton kernels: the logits are read once, in the lm_head's own dtype, and never written.

The first computes the maximum and the sum of exponentials of each block of ``BLOCK`` vocabulary entries. The second,
with one program for each row, works on the blocks. It computes logsumexp from maxima and sums, then takes the nucleus
entry by entry from the block with the largest maximum, which is read again for its next entry. For each draw it finds
first the block, then the entry. ``selection`` has the same rule in plain torch, and ``logit_codec`` the reference.

    bytes moved per logit = width + 16 / BLOCK + (kept + S) * BLOCK * width / V

with ``width`` the dtype's. Each block is written and read once as two float32 numbers; each kept entry and each draw
reads a block.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from logit_codec import ABSENT, MAX_TOKEN_ID

BLOCK = 128  # vocabulary entries whose exponentials are summed in float32; sums of blocks are float64
BLOCKS_A_PROGRAM = 8
BLOCKS_A_WARP = 512  # blocks of a row for each warp, in the second kernel
# Where a batch's logits are computed in pieces, these are slices, aligned in any way: the kernel is built once for all,
# and not again in the middle of a run.
SLICES = ("tokens", "uniforms")


def select(
    logits: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor, settings: Any
) -> dict[str, torch.Tensor]:
    """As ``selection.select``, for logits (R, V) of any floating dtype, which are not changed."""
    num_rows, vocabulary = logits.shape
    top_k, num_sampled = settings.top_k, settings.num_sampled
    num_blocks = triton.cdiv(vocabulary, BLOCK)
    maxima, sums = (logits.new_empty(num_rows, num_blocks, dtype=torch.float32) for _ in range(2))
    selected = _empty_results(logits, top_k, num_sampled)
    grid = (num_rows, triton.cdiv(num_blocks, BLOCKS_A_PROGRAM))
    padded = triton.next_power_of_2(num_blocks)
    with torch.cuda.device_of(logits):  # Triton launches on the thread's device, wherever the tensors are
        _block_sums[grid](logits, maxima, sums, vocabulary, num_blocks, logits.stride(0), BLOCKS_A_PROGRAM, BLOCK)
        _select_row[(num_rows,)](
            logits,
            maxima,
            sums,
            tokens,
            uniforms,
            *selected.values(),
            vocabulary,
            num_blocks,
            min(num_blocks, MAX_TOKEN_ID // BLOCK),
            logits.stride(0),
            settings.top_p if settings.top_p < 1 else 2.0,  # rounding must not cut a nucleus that takes everything
            top_k,
            num_sampled,
            padded,
            BLOCK,
            num_warps=warps_for(padded),
        )
    return selected


def warps_for(blocks: int) -> int:
    """Warps for each row of so many blocks, in the second kernel."""
    return max(4, min(16, blocks // BLOCKS_A_WARP))


def _empty_results(logits: torch.Tensor, top_k: int, num_sampled: int) -> dict[str, torch.Tensor]:
    """Results with all entries absent, in the order of the second kernel's parameters; it fills them in."""
    num_rows, device = len(logits), logits.device

    def ids(columns: int) -> torch.Tensor:
        return torch.full((num_rows, columns), ABSENT, dtype=torch.int64, device=device)

    def numbers(*columns: int) -> torch.Tensor:
        return torch.zeros(num_rows, *columns, dtype=torch.float64, device=device)

    return {
        "top_ids": ids(top_k),
        "top_probs": numbers(top_k),
        "sampled_ids": ids(num_sampled),
        "sampled_probs": numbers(num_sampled),
        "logsumexp": numbers(),
        "token_log_probs": numbers(),
    }


@triton.jit
def _block_sums(
    logits, maxima, sums, vocabulary, num_blocks, stride, blocks_a_program: tl.constexpr, block_size: tl.constexpr
):
    """Maxima and sums of exp(logit - maximum), float32 (R, num_blocks); a block of -inf has sum 0."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * blocks_a_program + tl.arange(0, blocks_a_program)
    column = block[:, None] * block_size + tl.arange(0, block_size)[None, :]
    x = tl.load(logits + row * stride + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
    maximum = tl.max(x, axis=1)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp(x - shift[:, None]), axis=1)
    tl.store(maxima + row * num_blocks + block, maximum, mask=block < num_blocks)
    tl.store(sums + row * num_blocks + block, total, mask=block < num_blocks)


@triton.jit(do_not_specialize_on_alignment=SLICES)
def _select_row(
    logits,
    maxima,
    sums,
    tokens,
    uniforms,
    top_ids,
    top_probs,
    sampled_ids,
    sampled_probs,
    logsumexp,
    token_log_probs,
    vocabulary,
    num_blocks,
    storable_blocks,
    stride,
    top_p: tl.constexpr,
    top_k: tl.constexpr,
    num_sampled: tl.constexpr,
    padded_blocks: tl.constexpr,
    block_size: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    place, entry = tl.arange(0, padded_blocks), tl.arange(0, block_size)
    maximum = tl.load(maxima + row * num_blocks + place, mask=place < num_blocks, other=float("-inf"))
    mass = tl.load(sums + row * num_blocks + place, mask=place < num_blocks, other=0.0).to(tl.float64)
    highest = tl.max(maximum, axis=0)
    mass = mass * tl.exp(maximum - highest).to(tl.float64)
    total = highest.to(tl.float64) + tl.log(tl.sum(mass, axis=0))
    tl.store(logsumexp + row, total)
    tl.store(token_log_probs + row, tl.load(logits + tl.load(tokens + row)).to(tl.float64) - total)
    mass = tl.where(place < storable_blocks, mass, 0.0)
    maximum = tl.where(place < storable_blocks, maximum, float("-inf"))

    # The nucleus. An entry is already taken if it is larger than `value`, or equal to it with an id up to `token`.
    kept, before = 0, total - total
    limit = tl.full((), top_p, tl.float64)  # a plain number would be float32
    value, token = tl.full((), float("inf"), tl.float32), tl.full((), -1, tl.int32)
    top, block = tl.max(maximum, axis=0, return_indices=True, return_indices_tie_break_left=True)
    while (kept < top_k) & (before < limit) & (top > float("-inf")):
        column = block * block_size + entry
        x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        taken = tl.where(top < value, -1, token)
        token = tl.min(tl.where((x == top) & (column > taken), column, 0x7FFFFFFF), axis=0)
        value = top
        probability = tl.exp(value.to(tl.float64) - total)
        tl.store(top_ids + row * top_k + kept, token.to(tl.int64))
        tl.store(top_probs + row * top_k + kept, probability)
        is_left = (x < value) | ((x == value) & (column > token))
        rest = tl.sum(tl.where(is_left, tl.exp(x - highest), 0.0), axis=0)
        maximum = tl.where(place == block, tl.max(tl.where(is_left, x, float("-inf")), axis=0), maximum)
        mass = tl.where(place == block, rest.to(tl.float64), mass)
        kept, before = kept + 1, before + probability
        top, block = tl.max(maximum, axis=0, return_indices=True, return_indices_tie_break_left=True)

    # The draws, from the remaining mass.
    running = tl.cumsum(mass, axis=0)
    left = tl.max(running, axis=0)
    last_block = tl.max(tl.where(mass > 0, place, 0), axis=0)
    uniform, to_probability = tl.load(uniforms + row), tl.exp(highest.to(tl.float64) - total)
    if left > 0:
        for draw in range(num_sampled):
            threshold = (uniform + draw) / num_sampled * left
            block = tl.minimum(tl.sum((running <= threshold).to(tl.int32), axis=0), last_block)
            column = block * block_size + entry
            x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
            is_left = (x < value) | ((x == value) & (column > token))
            inside = tl.where(is_left, tl.exp(x - highest), 0.0).to(tl.float64)
            within = tl.max(tl.where(place < block, running, 0.0), axis=0) + tl.cumsum(inside, axis=0)
            last = tl.max(tl.where(inside > 0, entry, 0), axis=0)
            offset = tl.minimum(tl.sum((within <= threshold).to(tl.int32), axis=0), last)
            drawn = tl.sum(tl.where(entry == offset, inside, 0.0), axis=0)
            tl.store(sampled_ids + row * num_sampled + draw, (block * block_size + offset).to(tl.int64))
            tl.store(sampled_probs + row * num_sampled + draw, drawn * to_probability)
