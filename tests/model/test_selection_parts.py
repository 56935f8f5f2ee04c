"""Selection in parts, by groups of two to four processes: against the plain reference, and against one process."""

import numpy as np
import pytest
import torch
from gloo_groups import GlooGroups, even_widths
from selection_reference import assert_is_reference, draws_elsewhere, exact_log_probs

import logit_codec
from chat_logits.model import selection
from chat_logits.model.selection import PendingDistributions, SelectionSettings

ROUNDING = 1e-6  # of a tail's mass: sums of blocks are float32


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    with GlooGroups(tmp_path_factory.mktemp("groups")) as started:
        yield started


def random_case(rows: int, vocabulary: int, spread: float = 4, seed: int = 0):
    """Logits (R, V) float32, target tokens and uniforms."""
    generator = torch.Generator().manual_seed(seed or vocabulary)
    logits = torch.randn(rows, vocabulary, generator=generator) * spread
    tokens = torch.randint(0, vocabulary, (rows,), generator=generator)
    return logits, tokens, torch.rand(rows, generator=generator, dtype=torch.float64)


def assert_same(found: logit_codec.Distributions, one: logit_codec.Distributions) -> None:
    """Ids and all; numbers to float32's rounding."""
    np.testing.assert_array_equal(found.top_ids, one.top_ids)
    np.testing.assert_array_equal(found.sampled_ids, one.sampled_ids)
    for name in ("top_probs", "sampled_probs"):
        np.testing.assert_allclose(getattr(found, name), getattr(one, name), rtol=1e-6, err_msg=name)
    for name in ("logsumexp", "token_log_probs"):  # nats
        np.testing.assert_allclose(getattr(found, name), getattr(one, name), rtol=0, atol=1e-6, err_msg=name)


def of_one(logits, tokens, uniforms, settings) -> logit_codec.Distributions:
    return PendingDistributions([selection.select(logits.clone(), tokens, uniforms, settings)]).wait()


@pytest.mark.parametrize("parts", [2, 3, 4, "without the first"])
@pytest.mark.parametrize(
    "vocabulary, rows", [(3, 9), (5, 9), (127, 12), (129, 12), (4_097, 12), (151_936, 3), (262_144, 2), (262_401, 2)]
)
def test_parts_find_what_the_reference_finds(groups, parts, vocabulary, rows):
    """Vocabularies that do not divide by the number of parts, with parts that are empty and ids beyond the storable."""
    logits, tokens, uniforms = random_case(rows, vocabulary)
    widths = even_widths(vocabulary, 2 if isinstance(parts, str) else parts)
    for top_k, top_p, num_sampled in [(16, 0.98, 8), (64, 1.0, 16), (1, 0.5, 1), (5, 0.9, 0)]:
        top_k = min(top_k, vocabulary)
        settings = SelectionSettings(top_k, top_p, num_sampled)
        found, _ = groups.select(parts, logits, widths, tokens, uniforms, settings)
        assert_is_reference(found, logits, uniforms, top_k, top_p, num_sampled)
        exact = exact_log_probs(logits)
        assert max(draws_elsewhere(found, exact, uniforms, num_sampled), default=0) < ROUNDING
        right = np.take_along_axis(exact, tokens[:, None].numpy(), 1)[:, 0]
        np.testing.assert_allclose(found.token_log_probs, right, atol=2e-6)
        lse = torch.logsumexp(logits.double(), dim=1)
        np.testing.assert_allclose(found.logsumexp, lse, atol=2e-6, rtol=0)
        assert_same(found, of_one(logits, tokens, uniforms, settings))


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_logits_go_by_their_ids_whatever_the_number_of_parts(groups, parts, dtype):
    """As the reference, the lowest ids first; also 0.0 and -0.0, and where -inf leaves little."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(8, 1000, generator=generator)
    logits[1] = 1.5
    logits[2:4] = logits[2:4].round()
    logits[4, 5:940] = -torch.inf
    logits[5] = -torch.inf
    logits[5, [3, 700]] = 2.0
    logits[6] = torch.where(torch.arange(1000) % 3 == 0, -0.0, 0.0)
    logits[7, 990] += 30
    logits, uniforms = logits.to(dtype), torch.rand(8, generator=generator, dtype=torch.float64)
    for top_k, top_p in [(12, 0.9), (200, 1.0)]:
        settings = SelectionSettings(top_k, top_p, 6)
        found, _ = groups.select(parts, logits, even_widths(1000, parts), torch.arange(8), uniforms, settings)
        assert_is_reference(found, logits, uniforms, top_k, top_p, 6)


@pytest.mark.parametrize("widths", [[1, 999], [999, 1], [500, 0, 500], [0, 1000], [0, 0, 1000], [400, 100, 3, 497]])
def test_parts_of_any_width(groups, widths):
    logits, tokens, uniforms = random_case(20, 1000)
    settings = SelectionSettings(16, 0.98, 8)
    found, _ = groups.select(len(widths), logits, widths, tokens, uniforms, settings)
    assert_same(found, of_one(logits, tokens, uniforms, settings))


@pytest.mark.parametrize("vocabulary", [1000, 760, 750, 260])
def test_columns_behind_the_vocabulary_are_not_there(groups, vocabulary):
    """Parts of 256 columns each, as a split with padding has them: the last ones hold what is no logit."""
    logits, tokens, uniforms = random_case(6, 1024)
    logits[:, vocabulary:] = torch.nan
    tokens, settings = tokens % vocabulary, SelectionSettings(16, 0.98, 8)
    found, _ = groups.select(4, logits, [256] * 4, tokens, uniforms, settings, vocabulary)
    assert_same(found, of_one(logits[:, :vocabulary], tokens, uniforms, settings))


def test_more_entries_than_there_are_leave_places_absent(groups):
    logits, tokens, uniforms = random_case(4, 7)
    logits[0, :5] = -torch.inf
    found, _ = groups.select(3, logits, [3, 3, 1], tokens, uniforms, SelectionSettings(9, 1.0, 2))
    assert (found.top_ids >= 0).sum(axis=1).tolist() == [2, 7, 7, 7]
    assert sorted(found.top_ids[1][:7]) == list(range(7))
    assert (found.sampled_ids == -1).all() and (found.sampled_probs == 0).all() and (found.top_probs[:, 7:] == 0).all()


def test_draws_at_the_ends_of_the_uniforms_range(groups):
    """u = 0 draws the first id with mass; the largest u, times Z, may round to the end itself."""
    logits, tokens, _ = random_case(60, 300)
    logits[:, :7], logits[:, 290:] = -torch.inf, -torch.inf
    for uniform in (0.0, 1 - 2**-53):
        uniforms, settings = torch.full((60,), uniform, dtype=torch.float64), SelectionSettings(3, 0.9, 5)
        found, _ = groups.select(3, logits, [100] * 3, tokens, uniforms, settings)
        assert_is_reference(found, logits, uniforms, 3, 0.9, 5)
        edge = found.sampled_ids[:, 0] if uniform == 0 else found.sampled_ids[:, -1]
        assert (edge < 12).all() if uniform == 0 else (edge > 284).all()
        assert ((found.sampled_ids >= 7) & (found.sampled_ids < 290)).all()


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("column", [2, 900])
def test_logits_that_are_not_finite_show_in_their_own_position(groups, bad, column):
    logits, tokens, uniforms = random_case(3, 1000)
    logits[1, column] = bad
    settings = SelectionSettings(8, 0.9, 4)
    found, _ = groups.select(4, logits, [250] * 4, tokens, uniforms, settings)
    assert np.isfinite(found.logsumexp).tolist() == [True, False, True]
    for i in (0, 2):
        alone = of_one(*(column[i : i + 1] for column in (logits, tokens, uniforms)), settings)
        assert found.top_ids[i].tolist() == alone.top_ids[0].tolist()
        assert found.sampled_ids[i].tolist() == alone.sampled_ids[0].tolist()


@pytest.mark.parametrize("firsts, vocabulary", [((0, 501), 1000), ((0, 499), 1000), ((500, 0), 1000), ((0, 500), 1001)])
def test_parts_that_do_not_make_up_the_vocabulary_are_refused_by_all(groups, firsts, vocabulary):
    logits, tokens, uniforms = random_case(2, 1000)
    calls = [
        (part, first, vocabulary, tokens, uniforms, SelectionSettings(8, 0.9, 4))
        for part, first in zip(logits.split(500, dim=1), firsts, strict=True)
    ]
    said, _ = groups.ask(2, calls)
    assert len(set(said)) == 1
    assert f"from id {firsts[1]:,} on" in said[0] and "expected parts that follow one another" in said[0]


def test_no_rows_are_no_results(groups):
    logits, tokens, uniforms = random_case(0, 1000, seed=1)
    found, _ = groups.select(2, logits, [500, 500], tokens, uniforms, SelectionSettings(8, 0.9, 4))
    assert found.top_ids.shape == (0, 8) and found.sampled_ids.shape == (0, 4) and found.logsumexp.shape == (0,)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_thousands_of_positions_are_those_of_one_process(groups, parts):
    """But for draws whose threshold is within rounding of a border, where both are right."""
    logits, tokens, uniforms = random_case(3000, 4_097, spread=2.5)
    settings = SelectionSettings(64, 0.98, 16)
    found, _ = groups.select(parts, logits, even_widths(4_097, parts), tokens, uniforms, settings)
    one = of_one(logits, tokens, uniforms, settings)
    # Where float32 logits are equal, parts have the lowest id first; one process has any.
    ranked = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :64]
    np.testing.assert_array_equal(found.top_ids, np.where(found.top_ids >= 0, ranked, -1))
    equal = (np.sort(found.top_ids) == np.sort(one.top_ids)).all(axis=1)
    assert equal.sum() >= len(logits) - 5
    np.testing.assert_array_equal(found.top_ids >= 0, one.top_ids >= 0)
    exact = exact_log_probs(logits)
    for distributions in (found, one):
        assert max(draws_elsewhere(distributions, exact, uniforms, 16), default=0) < ROUNDING
    elsewhere = (found.sampled_ids != one.sampled_ids).any(axis=1).sum()
    assert elsewhere <= 15  # a half of a percent


def likely_first(rows: int, vocabulary: int):
    """Logits as of a vocabulary that has its frequent tokens first: most of the best entries are in the first part."""
    logits, tokens, uniforms = random_case(rows, vocabulary, spread=2.5)
    return logits - torch.arange(1, vocabulary + 1).log() * 1.5, tokens, uniforms


KINDS = {
    "random": random_case,
    "likely first": likely_first,
    "likely last": lambda *size: (likely_first(*size)[0].flip(1), *likely_first(*size)[1:]),
    "all equal": lambda *size: (random_case(*size)[0] * 0, *random_case(*size)[1:]),
}


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k, num_sampled", [(64, 16), (16, 0), (1, 0), (256, 64)])
def test_what_processes_send_is_of_the_order_of_k_and_s(groups, parts, kind, top_k, num_sampled):
    """All of them together, below 16 (K + S) + 64 N bytes a position, whatever the vocabulary."""
    sent = {}
    for vocabulary in (4_097, 40_000):
        case, settings = KINDS[kind](64, vocabulary), SelectionSettings(top_k, 0.98, num_sampled)
        _, bytes_sent = groups.select(parts, case[0], even_widths(vocabulary, parts), *case[1:], settings)
        sent[vocabulary] = sum(bytes_sent) / 64
        assert 8 < sent[vocabulary] < 16 * (top_k + num_sampled) + 64 * parts
    assert sent[40_000] < 1.25 * sent[4_097]
