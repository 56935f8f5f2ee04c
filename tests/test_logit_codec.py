"""The codec against FORMAT.md's worked numbers, a naive decoder, and statistics of the sampled tail."""

import json
import math
from pathlib import Path

import datasets
import numpy as np
import plain_decoder
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import logit_codec as codec

VECTORS = json.loads((Path(__file__).parent / "data" / "vectors.json").read_text())


def columns_of(written: dict) -> dict:
    """A row of vectors.json as columns: hex becomes bytes."""
    return {key: bytes.fromhex(value) if isinstance(value, str) else value for key, value in written.items()}


ROW = columns_of(VECTORS["row"]["columns"])
SIZES = {"top_k": 3, "num_sampled": 2, "vocab_size": 2**18}


# --- worked numbers ---


def test_code_table():
    expected = VECTORS["code_table_log_probs"]
    assert codec.CODE_LOG_PROBS[0] == -math.inf
    np.testing.assert_allclose(codec.CODE_LOG_PROBS[1:], expected[1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("vector", VECTORS["index_packing"], ids=lambda v: str(v["token_ids"]))
def test_index_packing(vector):
    low, high = codec.pack_indices(vector["token_ids"])
    assert (low.tolist(), high.hex()) == (vector["low"], vector["high_hex"])
    assert codec.unpack_indices(vector["low"], bytes.fromhex(vector["high_hex"])).tolist() == vector["token_ids"]


@pytest.mark.parametrize("vector", VECTORS["head_codes"], ids=lambda v: str(v["codes"]))
def test_head_codes(vector):
    probabilities = np.array([vector["probabilities"]])
    kept = codec.nucleus_cut(probabilities, vector["top_p"])
    assert codec.carried_codes(probabilities, kept)[0].tolist() == vector["codes"]


@pytest.mark.parametrize("vector", VECTORS["uniforms"], ids=lambda v: f"{v['seed']}-{v['source_index']}")
def test_uniforms(vector):
    found = codec.draw_uniforms(vector["seed"], vector["source_index"], 9)
    np.testing.assert_allclose(found[:4], vector["first"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("vector", VECTORS["tail_draws"], ids=lambda v: f"S{v['num_sampled']}")
def test_tail_draws(vector):
    drawn = codec.draw_tail(np.array(vector["probabilities"]), vector["excluded"], vector["u"], vector["num_sampled"])
    expected = vector["token_ids"] or [codec.ABSENT] * vector["num_sampled"]
    assert drawn.tolist() == expected


@pytest.mark.parametrize("index", [0, 1, 2, -1, -3])
def test_worked_row_decodes(index):
    codec.validate_row(ROW, **SIZES)
    position, expected = codec.dequantize_all_logits(ROW, index), VECTORS["row"]["decoded"][index]
    head = ~position.is_sampled
    nucleus = dict(zip(position.token_ids[head].tolist(), position.weights[head], strict=True))
    assert nucleus == pytest.approx({int(i): p for i, p in expected["nucleus"].items()}, abs=1e-6)
    assert list(nucleus) == [int(i) for i in expected["nucleus"]]
    np.testing.assert_allclose(np.exp(position.log_probs[head]), position.weights[head], atol=1e-12)
    tail = zip(
        position.token_ids[~head].tolist(), np.exp(position.log_probs[~head]), position.weights[~head], strict=True
    )
    sampled = {i: (p, weight) for i, p, weight in tail}
    assert sampled.keys() == {int(i) for i in expected["sampled"]}
    for token, numbers in expected["sampled"].items():
        assert sampled[int(token)] == pytest.approx((numbers["probability"], numbers["weight"]), abs=1e-6)
    assert position.tail_mass == pytest.approx(expected["tail_mass"], abs=1e-6)
    assert position.logsumexp == VECTORS["row"]["columns"]["logsumexp"][index]


def test_numbers_of_the_worked_row():
    """The page's own, as they are stored, and from the other columns by the plain decoder and by the codec."""
    stored = {name: ROW[name] for name in codec.ROW_NUMBERS}
    target_ids = VECTORS["row"]["target_ids"]
    assert plain_decoder.numbers_of_row(ROW, target_ids, 3, 2) == pytest.approx(stored, rel=1e-7)
    (top_ids, top_codes), (_, sampled_codes) = (codec.row_entries(ROW, kind) for kind in ("top", "sampled"))
    entropies = codec.position_entropies(top_codes, sampled_codes)
    log_probs = np.array(ROW["token_log_probs"], np.float32)
    found = codec.numbers_of_rows(entropies, top_ids[:, 0] == target_ids, log_probs, [3])
    assert found == {name: [value] for name, value in stored.items()}


@pytest.mark.parametrize("vector", VECTORS["malformed_rows"], ids=lambda v: v["why"])
def test_malformed_worked_rows_are_refused(vector):
    column = "top_logits_quantized" if vector["why"] == "lengths do not fit" else next(iter(vector["change"]))
    with pytest.raises(codec.RowError, match=f"column {column}: found .*, expected"):
        codec.validate_row({**ROW, **columns_of(vector["change"])}, **SIZES)


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"token_log_probs": [-1.0]}, "token_log_probs"),
        ({"sampled_indices_low": [5, 0, 9, 9, 1, 0]}, "sampled_indices_low"),
        ({"sampled_indices_high": b"\x08\x10"}, "sampled_indices_high"),
        ({"top_indices_low": None}, "top_indices_low"),
        ({"top_indices_low": [1, None, 3, 4, 5, 6, 0, 0, 0]}, "top_indices_low"),
        ({"logsumexp": [1.0, None, 2.0]}, "logsumexp"),
        ({"logsumexp": [1.0, float("nan"), 2.0]}, "logsumexp"),
        ({"token_log_probs": [-1.0, 5.0, -2.0]}, "token_log_probs"),
        ({"token_log_probs": [-1.0, float("nan"), -2.0]}, "token_log_probs"),
        ({"num_tokens": None}, "num_tokens"),
        ({"mean_nll": float("nan")}, "mean_nll"),
        ({"mean_entropy": float("inf")}, "mean_entropy"),
        ({"max_surprisal": "4"}, "max_surprisal"),
        ({"top1_rate": [0.5, 2.0]}, "top1_rate"),
    ],
)
def test_other_malformed_rows_are_refused_by_name(change, column):
    with pytest.raises(codec.RowError, match=f"column {column} of row 7: found .*, expected"):
        codec.validate_row({**ROW, **change}, **SIZES, row_number=7)


def test_a_real_token_of_no_probability_is_no_damage():
    infinite = {"mean_nll": float("inf"), "max_surprisal": float("inf")}
    codec.validate_row({**ROW, "token_log_probs": [-float("inf"), 0.0, -1.0], **infinite}, **SIZES)


def test_an_id_at_the_vocabulary_size_is_refused():
    with pytest.raises(codec.RowError, match="id 262143, expected ids below the vocabulary size 262143"):
        codec.validate_row(ROW, top_k=3, num_sampled=2, vocab_size=262143)


def test_positions_outside_the_row_are_refused():
    for index in (3, -4):
        with pytest.raises(IndexError, match="3 extracted tokens"):
            codec.dequantize_all_logits(ROW, index)


def test_reading_refuses_columns_that_disagree():
    with pytest.raises(codec.RowError, match="top_"):
        codec.dequantize_all_logits({**ROW, "top_indices_high": b"\x12"}, 0)


# --- properties ---

token_ids = st.lists(st.integers(0, 2**18 - 1), max_size=70)


@given(token_ids)
def test_ids_survive_packing_in_every_form(ids):
    low, high = codec.pack_indices(ids)
    assert codec.unpack_indices(low, high).tolist() == ids
    assert codec.unpack_indices(low.tolist(), list(high)).tolist() == ids
    assert codec.unpack_indices(low.astype("<u2").tobytes(), np.frombuffer(high, np.uint8)).tolist() == ids


@given(st.lists(st.integers(2**18, 2**40) | st.integers(-5, -1), min_size=1))
def test_ids_that_do_not_fit_are_refused(ids):
    with pytest.raises(ValueError, match="expected 0 to 262143"):
        codec.pack_indices(ids)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_high_bits_whose_zeros_a_format_has_cut_off_are_whole_again(kind):
    """Rows whose packed bytes end in zeros, in the middle too, as ``datasets`` formats them."""
    all_ids = [[70_000, 1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3], [200_000] * 4, [0, 0, 0, 0, 140_000]]
    packed = [codec.pack_indices(ids) for ids in all_ids]
    rows = datasets.Dataset.from_list([{"low": low.tolist(), "high": high} for low, high in packed])
    found = [codec.unpack_indices(row["low"], row["high"]).tolist() for row in rows.with_format(kind)]
    assert found == all_ids


@pytest.mark.parametrize(
    ("low", "high", "column", "found"),
    [
        ([70_000, -1], b"\0", "low", "70000"),
        (np.array([3, -1]), b"\0", "low", "-1"),
        ([1.5, 2.0], b"\0", "low", "1.5"),
        ([1.0, math.nan], b"\0", "low", "nan"),
        ([1, 2], [256], "high", "256"),
        ([1, 2], [-1], "high", "-1"),
    ],
)
def test_numbers_beyond_16_and_8_bits_are_refused(low, high, column, found):
    with pytest.raises(ValueError, match=f"column indices_{column}: found {found}, expected whole numbers from 0 to "):
        codec.unpack_indices(low, high)
    lists = {"top_indices_low": [*low, *[0] * 7], "top_indices_high": [*high, 0, 0]}
    with pytest.raises(codec.RowError, match=f"column top_indices_{column}: found {found}, expected"):
        codec.dequantize_all_logits({**ROW, **lists}, 0)
    with pytest.raises(codec.RowError, match="column top_indices_"):
        codec.validate_row({**ROW, **lists}, **SIZES)


def formatted(kind: str, rows: list[dict]) -> list[dict]:
    """The rows as ``datasets`` gives them in this format, one at a time."""
    features = datasets.Dataset.from_list(rows).features
    for name in ("top_indices_low", "sampled_indices_low"):
        features[name] = datasets.List(datasets.Value("uint16"))
    read = datasets.Dataset.from_list(rows, features=features).with_format(kind)
    found = [read[i] for i in range(len(rows))]
    if kind == "pandas":
        return [row.iloc[0].to_dict() for row in found]
    return [{name: row[name][0] for name in row.columns} for row in found] if kind == "polars" else found


@pytest.mark.parametrize("kind", [None, "numpy", "torch", "pandas", "polars"])
def test_rows_of_every_format_decode_and_short_columns_are_refused(kind):
    """Seven positions of K = 3, S = 2, each with a nucleus of one entry, so that codes and high bits end in zeros."""
    codes = [200, 0, 0] * 7
    low, high = codec.pack_indices([9, 0, 0] * 7)
    row = {
        **{"top_logits_quantized": bytes(codes), "top_indices_low": low.tolist(), "top_indices_high": high},
        **{"sampled_logits_quantized": bytes(14), "sampled_indices_low": [0] * 14, "sampled_indices_high": bytes(4)},
        **{"logsumexp": [1.0] * 7, "num_tokens": 7},
    }
    cut = {**row, "top_logits_quantized": bytes(codes[:-4])}  # with them the last position's one entry
    without_ids = {**row, "top_indices_high": b""}
    (whole, short, bare) = formatted(kind, [row, cut, without_ids])
    for index in range(7):
        assert codec.dequantize_all_logits(whole, index).token_ids.tolist() == [9]
    assert codec.decode_row(whole).top_ids.tolist() == [[9, 0, 0]] * 7
    for read in (lambda row: codec.dequantize_all_logits(row, 0), codec.decode_row):
        with pytest.raises(ValueError, match=r"17 codes|size 17|found length 1[67], expected at least 19"):
            read(short)
        if kind in (None, "pandas", "polars"):  # the others cut off zeros themselves
            with pytest.raises(ValueError, match=r"0 high|0 bytes of high bits"):
                read(bare)


@given(token_ids, st.integers(1, 3))
def test_high_bits_of_another_length_are_refused(ids, extra):
    low, high = codec.pack_indices(ids)
    with pytest.raises(ValueError, match="bytes of high bits"):
        codec.unpack_indices(low, high + bytes(extra))


@given(st.floats(0, 1))
def test_nearest_code_is_the_formulas(probability):
    found = int(codec.nearest_codes(np.array([probability]))[0])
    exact = 510 / math.pi * math.asin(probability ** (1 / 6))
    assert abs(found - min(255, max(1, exact))) <= 0.5 + 1e-9


@st.composite
def nuclei(draw):
    """Probabilities of one position's top K, most probable first."""
    weights = draw(st.lists(st.floats(1e-9, 1), min_size=1, max_size=20))
    rest = draw(st.floats(0, 1))
    return sorted((weight / (sum(weights) + rest) for weight in weights), reverse=True)


@given(st.lists(nuclei(), min_size=1, max_size=5), st.floats(0.05, 1))
@settings(max_examples=300)
def test_carried_codes_are_the_naive_ones(rows, top_p):
    """Several at once, of different lengths."""
    widest = max(map(len, rows))
    array = np.array([[*row, *[0.0] * (widest - len(row))] for row in rows])
    there = np.array([[True] * len(row) + [False] * (widest - len(row)) for row in rows])
    found = codec.carried_codes(array, codec.nucleus_cut(array, top_p) & there)
    for codes, row in zip(found.tolist(), rows, strict=True):
        assert codes == plain_decoder.carried_codes(row, top_p) + [0] * (widest - len(row))


@given(nuclei())
def test_the_carry_keeps_the_total(probabilities):
    array = np.array([probabilities])
    codes = codec.carried_codes(array, np.ones_like(array, bool))[0]
    step = np.diff(codec.CODE_PROBS).max()
    if codes.max() < 255 and codes.min() > 1:
        assert abs(codec.CODE_PROBS[codes].sum() - sum(probabilities)) <= step


@st.composite
def tails(draw):
    weights = np.array(draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]) | st.floats(1e-6, 1), min_size=1)))
    excluded = draw(st.sets(st.integers(0, len(weights) - 1)))
    total = weights.sum() or 1.0
    uniform = draw(st.floats(0, 1, exclude_max=True))
    return weights / total, sorted(excluded), uniform, draw(st.integers(1, 9))


@given(tails())
@settings(max_examples=300)
def test_draws_are_the_naive_ones(case):
    probabilities, excluded, uniform, count = case
    found = codec.draw_tail(probabilities, excluded, uniform, count)
    expected = plain_decoder.systematic_draws(probabilities.tolist(), excluded, uniform, count)
    assert found.tolist() == (expected or [codec.ABSENT] * count)


# --- whole rows ---


def random_distributions(rng, n, top_k, num_sampled, absent=0.3) -> codec.Distributions:
    """Distributions with absent entries, whatever a model might say."""
    top_probs = -np.sort(-rng.dirichlet(np.ones(top_k + 1), n)[:, :top_k], axis=1)
    top_ids = np.stack([rng.choice(2**18, top_k, replace=False) for _ in range(n)])
    kept = np.arange(top_k) < rng.integers(1, top_k + 1, n)[:, None]
    sampled_ids = np.sort(rng.integers(0, 2**18, (n, num_sampled)), axis=1)
    sampled_ids[rng.random(n) < absent] = codec.ABSENT
    return codec.Distributions(
        np.where(kept, top_ids, codec.ABSENT),
        top_probs * kept,
        sampled_ids,
        rng.random((n, num_sampled)) * 1e-3,
        rng.normal(20, 5, n),
        -rng.random(n),
    )


@pytest.mark.parametrize(("top_k", "num_sampled"), [(5, 3), (1, 0), (7, 1), (64, 16)])
def test_rows_of_a_batch_decode_as_the_naive_decoder_reads_them(top_k, num_sampled):
    rng = np.random.default_rng(top_k)
    lengths = [3, 1, 6]
    distributions = random_distributions(rng, 10, top_k, num_sampled)
    distributions.token_log_probs[7] = -np.inf  # of a token in the third row
    target_ids = np.where(rng.random(10) < 0.5, distributions.top_ids[:, 0], 2**18 - 1)
    rows = codec.encode_rows(distributions, lengths, target_ids)
    for row, length, ids in zip(rows, lengths, np.split(target_ids, np.cumsum(lengths[:-1])), strict=True):
        codec.validate_row(row, top_k, num_sampled, 2**18)
        numbers = plain_decoder.numbers_of_row(plain_row(row), ids.tolist(), top_k, num_sampled)
        assert {name: row[name] for name in codec.ROW_NUMBERS} == pytest.approx(numbers, rel=1e-6)
        assert all(row[name] == np.float32(row[name]) for name in codec.ROW_NUMBERS)
        whole = codec.decode_row(row)
        for index in range(length):
            check_position(row, index, top_k, num_sampled)
            position = codec.dequantize_all_logits(row, index)
            head = ~position.is_sampled
            present = np.isfinite(whole.top_log_probs[index])
            assert whole.top_ids[index][present].tolist() == position.token_ids[head].tolist()
            assert whole.tail_mass[index] == pytest.approx(position.tail_mass, abs=1e-12)


def plain_row(row: dict) -> dict:
    """With lists in place of arrays."""
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in row.items()}


def check_position(row: dict, index: int, top_k: int, num_sampled: int) -> None:
    """``dequantize_all_logits`` against the naive decoder at one position."""
    found = codec.dequantize_all_logits(row, index)
    expected = plain_decoder.decode_position(plain_row(row), index, top_k, num_sampled)
    head = ~found.is_sampled
    nucleus = list(zip(found.token_ids[head].tolist(), np.exp(found.log_probs[head]), strict=True))
    assert [i for i, _ in nucleus] == [i for i, _ in expected["nucleus"]]
    assert [p for _, p in nucleus] == pytest.approx([p for _, p in expected["nucleus"]], abs=1e-12)
    sampled = found.token_ids[~head].tolist()
    assert set(sampled) == set(expected["sampled"]) and len(sampled) == len(set(sampled))
    for token, log_prob, weight in zip(sampled, found.log_probs[~head], found.weights[~head], strict=True):
        assert (math.exp(log_prob), weight) == pytest.approx(expected["sampled"][token], abs=1e-12)
    assert (np.diff(found.log_probs[~head]) <= 0).all()
    assert found.tail_mass == pytest.approx(expected["tail_mass"], abs=1e-12)


# --- the sampled tail is unbiased ---

SEEDS, TOP_K, DRAWS = 2000, 8, 16
FUNCTIONS = {
    "id": lambda ids: ids.astype(float),
    "parity": lambda ids: (ids % 2).astype(float),
    "square_root": np.sqrt,
}


def distribution(kind: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    if kind == "zipf":
        weights = rng.permutation(1 / np.arange(1, 1001) ** 1.1)
    elif kind == "flat":
        weights = rng.random(1000) + 0.5
    else:
        weights = np.exp(rng.normal(0, 2.5, 1000))
    return weights / weights.sum()


@pytest.fixture(scope="module", params=["zipf", "flat", "lognormal"])
def read(request):
    """A distribution, its nucleus, and the stored positions of all seeds as a reader decodes them."""
    probabilities = distribution(request.param)
    kept = codec.select_nucleus(np.log(probabilities), TOP_K, 0.98)
    return probabilities, kept, [decoded(probabilities, kept, seed) for seed in range(SEEDS)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_tail_is_unbiased_and_of_small_variance(read, name):
    (probabilities, kept, positions), function = read, FUNCTIONS[name]
    estimates = np.array([(found.weights * function(found.token_ids)).sum() for found in positions])
    codes = codec.carried_codes(probabilities[kept][None], np.ones((1, len(kept)), bool))[0]
    head = codec.CODE_PROBS[codes]
    tail = np.delete(probabilities, kept)
    values = function(np.delete(np.arange(len(probabilities)), kept))
    mean = (tail * values).sum() / tail.sum()
    tail_mass = 1 - head.sum()
    exact = (head * function(kept)).sum() + tail_mass * mean
    standard_error = estimates.std(ddof=1) / math.sqrt(SEEDS)
    assert abs(estimates.mean() - exact) <= 4 * standard_error
    independent = tail_mass**2 / DRAWS * ((tail * values**2).sum() / tail.sum() - mean**2)
    assert estimates.var() <= (0.3 if name == "id" else 1.2) * independent


def decoded(probabilities, kept, seed):
    """The position of a row that was stored with one seed's draws."""
    drawn = codec.draw_tail(probabilities, kept, codec.draw_uniforms(seed, 11, 1)[0], DRAWS)
    stored = codec.Distributions(
        kept[None], probabilities[kept][None], drawn[None], probabilities[drawn][None], np.zeros(1), np.zeros(1)
    )
    return codec.dequantize_all_logits(codec.encode_rows(stored, [1], kept[:1])[0], 0)
