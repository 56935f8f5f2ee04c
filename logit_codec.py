"""The storage format's arithmetic: numbers to columns and back. FORMAT.md is the specification.

All functions are pure functions of NumPy arrays, and this file needs only NumPy: it can be copied and used alone.
Probabilities are over the whole vocabulary, log-probabilities in nats. An *absent* entry has token id ``ABSENT`` in
arrays, and code 0 with id 0 in stored columns.
"""

from dataclasses import dataclass

import numpy as np

MAX_TOKEN_ID = 2**18  # ids have 16 low and 2 high bits
ABSENT = -1

_CODES = np.arange(256)
# p(q) = sin(pi q / 510)^6, FORMAT.md, "Codes"; code 0 is the absent entry
CODE_PROBS = np.sin(np.pi * _CODES / 510) ** 6
with np.errstate(divide="ignore"):
    CODE_LOG_PROBS = 6 * np.log(np.sin(np.pi * _CODES / 510))
CODE_SURPRISALS = np.append(0.0, -CODE_LOG_PROBS[1:])  # -log p, nats, 0 for the absent entry
_PROBS_AND_PARTS = CODE_PROBS + 1j * CODE_PROBS * CODE_SURPRISALS  # p and -p log p: one complex sum takes half the time
# Half-way points between codes: probabilities from _BOUNDS[q - 1] up to _BOUNDS[q] have nearest code q.
_BOUNDS = np.sin(np.pi * (_CODES[:-1] + 0.5) / 510) ** 6
_UP, _DOWN = np.append(_BOUNDS, np.inf), np.append([-np.inf, -np.inf], _BOUNDS[1:])  # q becomes q + 1, q - 1


ROW_NUMBERS = ("mean_nll", "mean_entropy", "top1_rate", "max_surprisal")
RANGES = {  # of these; rounding of logsumexp to float32 may put the log-probability of a certain token just above 0
    **dict.fromkeys(("mean_nll", "max_surprisal"), (-1e-3, np.inf)),
    **{"mean_entropy": (0.0, float(np.finfo(np.float32).max)), "top1_rate": (0.0, 1.0)},
}
NUMBERS_TOLERANCE = 1e-6  # for a row's numbers: absolute up to 1, relative above; float32 rounds by 6e-8


class RowError(ValueError):
    """A stored row that does not follow FORMAT.md; the message names column, row, finding and expectation."""

    def __init__(self, column: str, finding: str, expected: str, row_number: int | None = None):
        where = "" if row_number is None else f" of row {row_number}"
        super().__init__(f"column {column}{where}: found {finding}, expected {expected}")
        self.column = column


@dataclass(frozen=True)
class Distributions:
    """The model's output at n positions, before quantisation.

    ``top_ids`` (n, K) int64 in rank order and ``sampled_ids`` (n, S) int64 ascending, ``ABSENT`` for absent entries;
    ``top_probs`` and ``sampled_probs`` float64 of the same shapes; ``logsumexp`` and ``token_log_probs`` (n,) float64,
    nats.
    """

    top_ids: np.ndarray
    top_probs: np.ndarray
    sampled_ids: np.ndarray
    sampled_probs: np.ndarray
    logsumexp: np.ndarray
    token_log_probs: np.ndarray


@dataclass(frozen=True)
class PositionDistribution:
    """One stored position: the nucleus in rank order, then the distinct sampled ids, most probable first.

    All arrays are (m,): ``token_ids`` int32, ``log_probs`` float64 of the codes (nats), ``weights`` float64 as in
    FORMAT.md, "Reading a position" (a nucleus entry's is p(code)), ``is_sampled`` bool. ``tail_mass`` is the
    probability outside the nucleus, and a token's logit is its log-probability plus ``logsumexp``.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray
    weights: np.ndarray
    is_sampled: np.ndarray
    tail_mass: float
    logsumexp: float


@dataclass(frozen=True)
class DecodedRow:
    """A whole stored row: ids int32 and log-probabilities float64 (nats) as (n, K) and (n, S) arrays.

    Absent entries have id 0 and log-probability -inf. ``tail_mass`` float64 and ``logsumexp`` float32 are (n,).
    """

    top_ids: np.ndarray
    top_log_probs: np.ndarray
    sampled_ids: np.ndarray
    sampled_log_probs: np.ndarray
    tail_mass: np.ndarray
    logsumexp: np.ndarray


# --- codes ---


def nearest_codes(probabilities: np.ndarray) -> np.ndarray:
    """Nearest code, 1 to 255, of each probability; same shape, int64.

    >>> nearest_codes(np.array([1.0, 0.5, 0.0])).tolist()
    [255, 178, 1]
    """
    return np.clip(np.searchsorted(_BOUNDS, probabilities, side="right"), 1, 255)


def carried_codes(probabilities: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Codes of a nucleus, uint8 (n, K), that keep each row's total (FORMAT.md, "Codes").

    ``probabilities`` float64 (n, K), most probable first; entries outside ``present`` (bool, same shape) get 0.
    """
    lengths = (present * np.arange(1, present.shape[1] + 1)).max(1, initial=0)
    order, widest = np.argsort(-lengths, kind="stable"), lengths.max(initial=0)
    # Longest first, so that the rows that have a k-th entry are adjacent; transposed, so that column k is contiguous.
    columns, kept = (np.ascontiguousarray(part[order, :widest].T) for part in (probabilities, present))
    rows = len(order) - np.searchsorted(np.sort(lengths), np.arange(widest), side="right")
    found = np.zeros((widest, len(order)), np.uint8)
    carry = np.zeros(len(order))
    for k, n in enumerate(rows):
        probability, is_kept = columns[k, :n], kept[k, :n]
        near, target = nearest_codes(probability), probability + carry[:n]
        code = (near + (target >= _UP[near]) - (target < _DOWN[near])) * is_kept
        found[k, :n] = code
        carry[:n] += np.where(is_kept, probability, 0) - CODE_PROBS[code]
    codes = np.zeros(present.shape, np.uint8)
    codes[order, :widest] = found.T
    return codes


# --- token ids ---


def pack_indices(token_ids) -> tuple[np.ndarray, bytes]:
    """Split ids below 2**18 into low 16 bits (uint16, same order) and packed high bits (four a byte).

    ``token_ids`` are integers of any shape, taken in C order. Raises ValueError for ids outside 0 to 2**18 - 1.

    >>> low, high = pack_indices([262143, 131072, 65536, 1])
    >>> low.tolist(), high.hex()
    ([65535, 0, 0, 1], '1b')
    """
    ids = np.asarray(token_ids, np.int64).reshape(-1)
    if ids.size and not 0 <= ids.min() <= ids.max() < MAX_TOKEN_ID:
        raise ValueError(f"token ids run from {ids.min()} to {ids.max()}, expected 0 to {MAX_TOKEN_ID - 1}")
    high = np.zeros(-(-ids.size // 4) * 4, np.uint8)
    high[: ids.size] = ids >> 16
    quads = high.reshape(-1, 4)
    packed = quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6
    return (ids & 0xFFFF).astype(np.uint16), packed.tobytes()


def unpack_indices(low, high) -> np.ndarray:
    """Token ids, int32 (n,): ``low | high_bits << 16``.

    ``low`` holds n 16-bit numbers (list, array, or little-endian bytes), ``high`` ceil(n/4) bytes with four
    2-bit entries each, the first in bits 0-1 (bytes, list or array). Trailing zeros that ``with_format("numpy")`` or
    ``"torch"`` has cut off are restored. Raises ValueError if lengths or numbers do not fit.

    >>> unpack_indices([65535, 0, 0, 1], b"\\x1b").tolist()
    [262143, 131072, 65536, 1]
    """
    high = _whole(high, low, -(-len(low) // 4))
    low, high = _as_numbers(low, "<u2", "indices_low"), _as_numbers(high, np.uint8, "indices_high")
    if len(high) != -(-len(low) // 4):
        raise ValueError(f"{len(high)} bytes of high bits for {len(low)} ids, expected {-(-len(low) // 4)}")
    return low.astype(np.int32) | _high_bits(high)[: len(low)] << 16


def _as_numbers(values, dtype, column: str) -> np.ndarray:
    """A column's values as ``dtype``. Raises RowError if that is an integer type and a value is not one of it."""
    if isinstance(values, (bytes, bytearray, memoryview)):
        return np.frombuffer(values, dtype)
    array, dtype = np.asarray(values), np.dtype(dtype)
    if array.dtype == dtype or dtype.kind == "f":
        return array.astype(dtype)
    with np.errstate(invalid="ignore"):
        numbers = array.astype(dtype)
    if (numbers != array).any():
        raise RowError(column, f"{array[numbers != array][0]}", f"whole numbers from 0 to {np.iinfo(dtype).max}")
    return numbers


def _whole(packed, low, length: int):
    """The bytes as they were stored with the ids ``low``. The formats "numpy" (bytes are ``numpy.bytes_``) and "torch"
    (bytes are plain, ids a tensor) cut off trailing zeros."""
    if isinstance(packed, np.bytes_) or (isinstance(packed, bytes) and type(low).__module__ == "torch"):
        return bytes(packed).ljust(length, b"\0")
    return packed


def _high_bits(packed: np.ndarray) -> np.ndarray:
    """The four 2-bit entries of each byte, int32 (4 * len,)."""
    return (packed[:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).astype(np.int32).reshape(-1)


# --- selection: the reference ---


def nucleus_cut(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Which of the K most probable entries are kept: bool (n, K) for float64 (n, K) in rank order."""
    if top_p >= 1:
        return np.ones(probabilities.shape, bool)
    before = np.zeros(probabilities.shape)
    before[:, 1:] = np.cumsum(probabilities, axis=1)[:, :-1]
    return before < top_p


def select_nucleus(log_probs: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Ids kept of one position's log-probabilities (V,) in nats, int64, most probable first: reference version."""
    storable = log_probs[:MAX_TOKEN_ID]
    ranked = np.argsort(-storable, kind="stable")[:top_k]
    ranked = ranked[np.isfinite(storable[ranked])]
    return ranked[nucleus_cut(np.exp(storable[ranked])[None], top_p)[0]]


def draw_tail(probabilities: np.ndarray, kept_ids: np.ndarray, uniform: float, num_sampled: int) -> np.ndarray:
    """Systematic draws in id order from the ids not kept, int64 (S,), all ``ABSENT`` if no probability is left.

    ``probabilities`` float64 (V,). The reference version of FORMAT.md, "What is stored at a position".
    """
    tail = np.array(probabilities[:MAX_TOKEN_ID], np.float64)
    tail[kept_ids] = 0
    running = np.cumsum(tail)
    if running[-1] <= 0:
        return np.full(num_sampled, ABSENT, np.int64)
    thresholds = (uniform + np.arange(num_sampled)) / num_sampled * running[-1]
    return np.minimum(np.searchsorted(running, thresholds, side="right"), np.flatnonzero(tail)[-1])


def draw_uniforms(seed: int, source_index: int, count: int, stream: int = 0) -> np.ndarray:
    """The conversation's uniforms, float64 (count,), one per extracted token, the same on every machine.

    The extraction uses ``stream`` 0; each thinning uses the next one, which is independent of the earlier ones.
    """
    return np.random.Generator(np.random.Philox(key=[seed, source_index], counter=[0, 0, 0, stream])).random(count)


# --- rows ---


def encode_rows(distributions: Distributions, lengths: list[int], target_ids: np.ndarray) -> list[dict]:
    """The numeric columns of consecutive stored rows with ``lengths`` positions each, at least 1 (their sum is n).

    ``target_ids`` int (n,) are the extracted tokens. One dict per row, by column name: ``*_logits_quantized`` and
    ``*_indices_high`` bytes, ``*_indices_low`` uint16, ``logsumexp`` and ``token_log_probs`` float32 (nats),
    ``num_tokens`` int, and the ``ROW_NUMBERS`` float. Raises ValueError for ids above 2**18 - 1.
    """
    present, drawn = distributions.top_ids != ABSENT, distributions.sampled_ids != ABSENT
    top_codes = carried_codes(distributions.top_probs, present)
    sampled_codes = np.where(drawn, nearest_codes(distributions.sampled_probs), 0).astype(np.uint8)
    top_ids, sampled_ids = distributions.top_ids * present, distributions.sampled_ids * drawn
    logsumexp, log_probs = (
        part.astype(np.float32) for part in (distributions.logsumexp, distributions.token_log_probs)
    )
    is_first = distributions.top_ids[:, 0] == target_ids
    numbers = numbers_of_rows(position_entropies(top_codes, sampled_codes), is_first, log_probs, lengths)
    rows, start = [], 0
    for i, length in enumerate(lengths):
        part = slice(start, start + length)
        rows.append(
            {
                **entry_columns("top", top_codes[part], top_ids[part]),
                **entry_columns("sampled", sampled_codes[part], sampled_ids[part]),
                "logsumexp": logsumexp[part],
                "num_tokens": length,
                **{name: values[i] for name, values in numbers.items()},
                "token_log_probs": log_probs[part],
            }
        )
        start += length
    return rows


def entry_columns(kind: str, codes: np.ndarray, ids: np.ndarray) -> dict:
    """The three columns of a row's nucleus (``kind`` "top") or draws ("sampled"), from codes uint8 and ids, (n, m)."""
    low, high = pack_indices(ids)
    return {
        f"{kind}_logits_quantized": codes.tobytes(),
        f"{kind}_indices_low": low,
        f"{kind}_indices_high": high,
    }


def position_entropies(top_codes: np.ndarray, sampled_codes: np.ndarray) -> np.ndarray:
    """E[-log p] at n positions as FORMAT.md estimates it, nats, float64 (n,), from codes uint8 (n, K) and (n, S).

    The nucleus exactly and the tail by its draws, unbiased; without draws only the nucleus' part, a lower bound.
    """
    totals = _PROBS_AND_PARTS[top_codes].sum(axis=1)
    shares = np.maximum(0.0, 1.0 - totals.real) / max(1, sampled_codes.shape[1])
    return totals.imag + shares * CODE_SURPRISALS[sampled_codes].sum(axis=1)


def numbers_of_rows(
    entropies: np.ndarray, is_first: np.ndarray, token_log_probs: np.ndarray, lengths: list[int]
) -> dict[str, list[float]]:
    """The ``ROW_NUMBERS`` of consecutive rows with ``lengths`` positions each, by name, rounded to float32.

    ``is_first`` bool (n,): whether the target token is the first entry of the nucleus; the others are in nats.
    """
    starts, surprisals = np.cumsum([0, *lengths[:-1]]), 0.0 - token_log_probs.astype(np.float64)
    means = (np.add.reduceat(values, starts) / lengths for values in (surprisals, entropies, is_first.astype(float)))
    numbers = [*means, np.maximum.reduceat(surprisals, starts)]
    return dict(zip(ROW_NUMBERS, (values.astype(np.float32).tolist() for values in numbers), strict=True))


def dequantize_all_logits(sample: dict, index: int) -> PositionDistribution:
    """The stored distribution, nucleus and sampled tail, at one position of a row; others are not decoded.

    ``sample`` is a stored row as any reader returns it; ``index`` counts its extracted tokens, from the end if it is
    negative. Raises IndexError outside the row, and RowError if the columns' lengths disagree or a number at the
    position does not fit its column's type.
    """
    n = int(sample["num_tokens"])
    if not -n <= index < n:
        raise IndexError(f"position {index} of a row with {n} extracted tokens")
    index %= n
    top_ids, top_codes = _entries_at(sample, "top", index, n)
    sampled_ids, sampled_codes = _entries_at(sample, "sampled", index, n)
    tail_mass = max(0.0, 1.0 - float(CODE_PROBS[top_codes].sum()))
    drawn = sampled_codes != 0
    distinct, first, repeats = np.unique(sampled_ids[drawn], return_index=True, return_counts=True)
    codes = sampled_codes[drawn][first]
    order = np.argsort(-codes.astype(int), kind="stable")
    kept = top_codes != 0
    share = tail_mass / max(1, len(sampled_codes))
    return PositionDistribution(
        token_ids=np.concatenate([top_ids[kept], distinct[order]]),
        log_probs=CODE_LOG_PROBS[np.concatenate([top_codes[kept], codes[order]])],
        weights=np.concatenate([CODE_PROBS[top_codes[kept]], share * repeats[order]]),
        is_sampled=np.arange(kept.sum() + len(distinct)) >= kept.sum(),
        tail_mass=tail_mass,
        logsumexp=float(sample["logsumexp"][index]),
    )


def _entries_at(sample: dict, kind: str, index: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 and codes uint8, both (width,), of one position."""
    low, high, codes = _entry_values(sample, kind, n)
    if len(low) % n or len(codes) != len(low) or len(high) != -(-len(low) // 4):
        finding = f"{len(codes)} codes, {len(low)} low and {len(high)} high entries"
        raise RowError(f"{kind}_*", finding, f"a multiple of {n}, as many low entries, a quarter of high bytes")
    width = len(low) // n
    start, end = index * width, (index + 1) * width
    packed = _as_numbers(high[start // 4 : -(-end // 4)], np.uint8, f"{kind}_indices_high")
    low = _as_numbers(low[start:end], "<u2", f"{kind}_indices_low")
    ids = low.astype(np.int32) | _high_bits(packed)[start % 4 :][:width] << 16
    return ids, _as_numbers(codes[start:end], np.uint8, f"{kind}_logits_quantized")


def _entry_values(row: dict, kind: str, n: int) -> tuple:
    """The low, high and code columns of a row with ``n`` positions, with trailing zeros that a format cut off restored.

    The last position's nucleus has a code other than 0, so its codes must reach into that; raises RowError otherwise.
    """
    low, high, codes = (row[f"{kind}_{name}"] for name in ("indices_low", "indices_high", "logits_quantized"))
    whole, least = _whole(codes, low, len(low)), len(low) // n * (n - 1) + 1
    if kind == "top" and len(codes) < min(least, len(whole)):
        raise RowError("top_logits_quantized", f"length {len(codes)}", f"at least {least}, zeros at the end cut off")
    return low, _whole(high, low, -(-len(low) // 4)), whole


def row_entries(row: dict, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 and codes uint8, (n, K) of a stored row's nucleus (``kind`` "top") or (n, S) of its draws ("sampled").

    Raises ValueError if the columns' lengths disagree.
    """
    n = int(row["num_tokens"])
    low, high, codes = _entry_values(row, kind, n)
    codes = _as_numbers(codes, np.uint8, f"{kind}_logits_quantized").reshape(n, -1)
    return unpack_indices(low, high).reshape(codes.shape), codes


def decode_row(row: dict) -> DecodedRow:
    """All positions of a stored row at once.

    ``row`` is as any reader returns it. Raises ValueError if the columns' lengths disagree; ``validate_row`` says
    which one is wrong.
    """
    arrays = {}
    for kind in ("top", "sampled"):
        arrays[f"{kind}_ids"], codes = row_entries(row, kind)
        arrays[f"{kind}_log_probs"] = CODE_LOG_PROBS[codes]
    stored = np.exp(arrays["top_log_probs"]).sum(axis=1)
    tail_mass = np.maximum(0.0, 1.0 - stored)
    return DecodedRow(**arrays, tail_mass=tail_mass, logsumexp=np.asarray(row["logsumexp"], np.float32))


# --- validation ---


def validate_row(row: dict, top_k: int, num_sampled: int, vocab_size: int, row_number: int | None = None) -> None:
    """Raise RowError if a stored row violates FORMAT.md, "What a reader refuses" (numeric columns).

    ``top_k``, ``num_sampled`` and ``vocab_size`` are those of ``extraction.json``; ``row_number`` is for the message.
    """
    stored = row.get("num_tokens")
    if not isinstance(stored, (int, np.integer)) or stored < 1:
        raise RowError("num_tokens", repr(stored), "at least 1 extracted token", row_number)
    n = int(stored)
    for kind, width in (("top", top_k), ("sampled", num_sampled)):
        _check_entries(row, kind, n * width, vocab_size, row_number)
    log_probs = _check_numbers(row, "token_log_probs", n, np.float64, row_number)
    if not (log_probs <= 1e-3).all():  # rounding of logsumexp to float32 may put a certain token just above 0
        raise RowError("token_log_probs", f"{log_probs.max()}", "log-probabilities, at most 0", row_number)
    if not np.isfinite(_check_numbers(row, "logsumexp", n, np.float64, row_number)).all():
        raise RowError("logsumexp", "a number that is not finite", "finite nats", row_number)
    for name, (least, most) in RANGES.items():
        numbers = np.asarray(row.get(name))  # one row's number, or those of several rows
        if numbers.dtype.kind not in "fiu":
            raise RowError(name, "null, or not a number", f"{least:g} to {most:g}", row_number)
        if not ((least <= numbers) & (numbers <= most)).all():
            raise RowError(name, f"{numbers.min()}", f"{least:g} to {most:g}", row_number)


def _check_numbers(row: dict, column: str, expected: int, dtype, row_number: int | None) -> np.ndarray:
    """The column as an array of ``expected`` numbers."""
    value = row.get(column)
    if value is None or len(value) != expected:
        finding = "nothing" if value is None else f"length {len(value)}"
        raise RowError(column, finding, f"length {expected}", row_number)
    try:
        return _as_numbers(value, dtype, column)
    except (TypeError, ValueError, OverflowError) as error:
        raise RowError(column, f"null, or not {np.dtype(dtype)}", f"{expected} numbers", row_number) from error


def _check_entries(row: dict, kind: str, count: int, vocab_size: int, row_number: int | None) -> None:
    low_name, high_name = f"{kind}_indices_low", f"{kind}_indices_high"
    codes = _check_numbers(row, f"{kind}_logits_quantized", count, np.uint8, row_number)
    low = _check_numbers(row, low_name, count, "<u2", row_number)
    high = _check_numbers(row, high_name, -(-count // 4), np.uint8, row_number)
    used_bits = 2 * (count % 4)
    if used_bits and high[-1] >> used_bits:
        raise RowError(high_name, f"last byte {high[-1]:#04x}", "padding bits of zero", row_number)
    ids = unpack_indices(low, high)
    beside_absent = ids[codes == 0]
    if beside_absent.any():
        raise RowError(low_name, f"id {beside_absent.max()} beside code 0", "id 0 there", row_number)
    if ids.size and ids.max() >= vocab_size:
        raise RowError(low_name, f"id {ids.max()}", f"ids below the vocabulary size {vocab_size}", row_number)
