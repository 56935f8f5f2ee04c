"""Losses and gradients against autograd over the dense target, what memory they take, and what is refused."""

import math
import multiprocessing
from pathlib import Path

import pytest
import torch
from random_models import ARCHITECTURES, random_model

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.training.head import LogitTransform, chunk_rows, logit_transform
from chat_logits.training.loss import fused_sparse_kd_loss, sparse_kd_loss

N, H, V, M = 13, 8, 50, 9
TRANSFORMS = {
    "none": LogitTransform(),
    "scale": LogitTransform(0.3),
    "cap": LogitTransform(cap=3.0),
    "both": LogitTransform(2.0, 4.0),
}


@pytest.fixture
def case():
    """Hidden states, a head with bias, ids of which two are the same, and weights, one of them 0."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, requires_grad=True)
    head = torch.nn.Linear(H, V)
    with torch.no_grad():
        for weights in head.parameters():
            weights.copy_(torch.randn(weights.shape, generator=generator))
    ids = torch.randint(0, V, (N, M), dtype=torch.int32, generator=generator)
    ids[:, 3] = ids[:, 4]
    weights = torch.rand(N, M, generator=generator)
    weights[:, 5] = 0
    return hidden, head, ids, weights / weights.sum(dim=1, keepdim=True)


def dense(ids, weights, vocab_size: int = V) -> torch.Tensor:
    """The target as a distribution over the whole vocabulary, in float64."""
    return torch.zeros(len(ids), vocab_size, dtype=torch.float64).scatter_add_(1, ids.long(), weights.double())


def dense_loss(logits, ids, weights) -> torch.Tensor:
    """The cross-entropies' mean, in float64."""
    return -(dense(ids, weights, logits.shape[1]) * logits.double().log_softmax(dim=1)).sum(dim=1).mean()


def with_gradients(loss, *tensors) -> list[torch.Tensor]:
    return [loss.detach().double(), *(each.double() for each in torch.autograd.grad(loss, tensors))]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Losses within 2e-6, gradients within 1e-6 in every entry."""
    assert (found[0] - expected[0]).abs() < 2e-6
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert (one - other).abs().max() < 1e-6


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("chunk", [1, 5, N, 64])
def test_the_fused_loss_is_the_dense_one(case, transform, chunk):
    hidden, head, ids, weights = case
    inputs = (hidden, head.weight, head.bias)
    expected = with_gradients(dense_loss(transform(head(hidden)), ids, weights), *inputs)
    assert_close(
        with_gradients(fused_sparse_kd_loss(hidden, head, ids, weights, chunk, transform=transform), *inputs), expected
    )
    assert_close(with_gradients(sparse_kd_loss(transform(head(hidden)), ids, weights), *inputs), expected)


def test_the_gradient_for_logits_is_the_students_distribution_less_the_target(case):
    hidden, head, ids, weights = case
    logits = head(hidden).detach().requires_grad_()
    sparse_kd_loss(logits, ids, weights, reduction="sum").backward()
    expected = logits.detach().double().softmax(dim=1) - dense(ids, weights)
    assert (logits.grad - expected).abs().max() < 1e-6


def test_worked_by_hand():
    """Logits 0, ln 2, ln 5 give q = 1/8, 2/8, 5/8; the target has 1/4 on the first, and 1/2 + 1/4 on the last."""
    logits = torch.tensor([[0.0, 2.0, 5.0]]).log()
    logits[0, 0] = 0
    ids, weights = torch.tensor([[2, 0, 2, 0]]), torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    loss = sparse_kd_loss(logits, ids, weights)
    assert loss.item() == pytest.approx(2.0794415 - 0.75 * 1.6094379, abs=1e-6)  # ln 8 - 3/4·ln 5
    entropy = torch.tensor([0.5623351])  # of 1/4 and 3/4
    assert sparse_kd_loss(logits, ids, weights, entropy).item() == pytest.approx(0.3100279, abs=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_entropy_and_reduction(case, fused):
    hidden, head, ids, weights = case

    def loss(**options):
        if fused:
            return fused_sparse_kd_loss(hidden, head, ids, weights, 4, **options).item()
        return sparse_kd_loss(head(hidden), ids, weights, **options).item()

    entropy = torch.arange(N, dtype=torch.float32) / 10
    assert loss(entropy=entropy) == pytest.approx(loss() - 0.6, abs=1e-5)  # their mean
    assert loss(reduction="sum") == pytest.approx(N * loss(), rel=1e-6)
    assert loss(entropy=entropy, reduction="sum") == pytest.approx(N * loss() - 7.8, rel=1e-5)


def test_an_absent_entry_does_nothing_where_its_logit_is_infinite():
    logits = torch.tensor([[float("-inf"), 0.0, 0.0]], requires_grad=True)
    loss = sparse_kd_loss(logits, torch.tensor([[1, 0]]), torch.tensor([[1.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(0.6931472, abs=1e-6)
    assert logits.grad.tolist() == [[0.0, -0.5, 0.5]]


# --- 16 bits ---

ROUNDING = 2**-8  # of a number to bfloat16, relative


def in_float64(
    hidden, weight, bias, ids, weights, transform=None
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """The loss, its gradients for hidden states, weight and bias, and, as large as the first two, the sums of the
    products' sizes that these are, all float64."""
    hidden, weight, bias = (each.detach().double() for each in (hidden, weight, bias))
    raw = (hidden @ weight.T + bias).requires_grad_()
    loss = dense_loss((transform or LogitTransform())(raw), ids, weights)
    (gradient,) = torch.autograd.grad(loss, raw)
    sizes = [gradient.abs() @ weight.abs(), gradient.abs().T @ hidden.abs()]
    return loss.detach(), [gradient @ weight, gradient.T @ hidden, gradient.sum(0)], [*sizes, torch.zeros_like(bias)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_summed_in_float32(case, dtype):
    """The loss is that of the rounded inputs in float64; gradients have the inputs' dtype and its rounding, and before
    their sums the rounding to bfloat16 that a model's own backward pass has, none to float16."""
    hidden, head, ids, weights = case
    hidden, head = hidden.detach().to(dtype).requires_grad_(), head.to(dtype)
    inputs = (hidden, head.weight, head.bias)
    loss = fused_sparse_kd_loss(hidden, head, ids, weights, 4)
    expected, gradients, sizes = in_float64(*inputs, ids, weights)
    assert loss.dtype == torch.float32 and (loss - expected).abs() < 2e-6
    rounding = ROUNDING if dtype == torch.bfloat16 else 0
    for found, right, size in zip(torch.autograd.grad(loss, inputs), gradients, sizes, strict=True):
        assert found.dtype == dtype
        excess = (found.double() - right).abs() - torch.finfo(dtype).eps * right.abs() - rounding * size
        assert excess.max() < 1e-6


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("chunk", [5, None])
def test_under_autocast_factors_are_bfloat16_and_sums_float32(case, transform, chunk):
    """The loss is that of rounded hidden states and weights in float64; gradients are float32, and of their products
    one factor each is rounded once more."""
    hidden, head, ids, weights = case
    inputs = (hidden, head.weight, head.bias)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_sparse_kd_loss(hidden, head, ids, weights, chunk, transform=transform)
    rounded = (hidden.bfloat16(), head.weight.bfloat16(), head.bias)
    expected, gradients, sizes = in_float64(*rounded, ids, weights, transform)
    assert (loss - expected).abs() < 2e-6
    for found, right, size in zip(torch.autograd.grad(loss, inputs), gradients, sizes, strict=True):
        assert found.dtype == torch.float32
        assert ((found.double() - right).abs() - ROUNDING * size).max() < 1e-6


def test_under_autocast_draws_have_the_gradient_of_the_whole_distribution_in_their_mean():
    """Of 20,000 targets of ten nucleus tokens and 8 draws from the other 40, at one hidden state: within five standard
    errors and bfloat16's rounding."""
    generator, n, kept, sampled = torch.Generator().manual_seed(0), 20_000, 10, 8
    hidden, weight = (torch.randn(rows, H, generator=generator).bfloat16().double() for rows in (1, V))
    teacher = (2 * torch.randn(V, generator=generator)).double().softmax(0).sort(descending=True).values
    mass, share = teacher[kept:].sum(), teacher[kept:] / teacher[kept:].sum()
    draws = kept + torch.multinomial(share, n * sampled, replacement=True, generator=generator).view(n, sampled)
    ids = torch.cat([torch.arange(kept).expand(n, -1), draws], dim=1)
    weights = torch.cat([teacher[:kept].expand(n, -1), (mass / sampled).expand(n, sampled)], dim=1)
    matrix = weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_sparse_kd_loss(hidden.float().expand(n, -1), matrix, ids, weights)
    (found,) = torch.autograd.grad(loss, matrix)
    student = (hidden @ weight.T)[0].softmax(0)
    variance = torch.cat([torch.zeros(kept), mass**2 / sampled * share * (1 - share)])
    allowed = 5 * (variance / n).sqrt() + ROUNDING * (student + teacher)
    assert ((found - (student - teacher)[:, None] * hidden).abs() <= allowed[:, None] * hidden.abs() + 1e-7).all()


def test_autocast_to_float16_rounds_nothing(case):
    hidden, head, ids, weights = case
    plain = fused_sparse_kd_loss(hidden, head, ids, weights)
    with torch.autocast("cpu", torch.float16):
        half = fused_sparse_kd_loss(hidden, head, ids, weights)
    assert half.item() == plain.item()
    for one, other in zip(*(torch.autograd.grad(loss, (hidden, head.weight)) for loss in (half, plain)), strict=True):
        assert torch.equal(one, other)


def test_a_float16_students_tail_keeps_its_gradient():
    """A student that gives 0.4% to 150,000 tokens together, 3e-8 each, by a loss that is scaled as GradScaler does."""
    scale, vocabulary = 2.0**16, 150_001
    hidden = torch.ones(1, 1, dtype=torch.float16)
    weight = torch.zeros(vocabulary, 1, dtype=torch.float16)
    weight[0] = 17.4375
    weight.requires_grad_()
    loss = scale * fused_sparse_kd_loss(hidden, weight, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
    (found,) = torch.autograd.grad(loss, weight)
    each = (weight.detach().double()[:, 0]).softmax(0)[1].item()
    assert 2.5e-8 < each < 3e-8  # half of the smallest float16 or less
    assert found[1:].double().mean().item() / scale == pytest.approx(each, rel=1e-3)
    assert found[0].item() / scale == pytest.approx(-each * (vocabulary - 1), rel=1e-3)


def test_a_chunks_logits_fit_the_device():
    assert 512 <= chunk_rows(torch.device("cuda"), 151_936) <= 2048
    assert chunk_rows(torch.device("cpu"), 151_936) * 151_936 * 4 <= 40 * 2**20
    assert chunk_rows(torch.device("cpu"), 10**9) == 1


def test_what_needs_no_gradient_gets_none(case):
    hidden, head, ids, weights = case
    head.requires_grad_(False)
    fused_sparse_kd_loss(hidden, head, ids, weights).backward()
    assert head.weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        assert not fused_sparse_kd_loss(hidden, head, ids, weights).requires_grad


def test_a_tied_head_adds_its_gradient_to_the_embeddings(case):
    """The weight, given as it is, also makes the hidden states."""
    _, head, ids, weights = case
    matrix = head.weight.detach().requires_grad_()
    tokens = torch.arange(N)
    fused = fused_sparse_kd_loss(torch.tanh(matrix[tokens]), matrix, ids, weights, 4)
    expected = dense_loss(torch.tanh(matrix[tokens]) @ matrix.T, ids, weights)
    assert_close(with_gradients(fused, matrix), with_gradients(expected, matrix))


def test_gradients_are_scaled_and_used_once(case):
    hidden, head, ids, weights = case
    (expected,) = torch.autograd.grad(fused_sparse_kd_loss(hidden, head, ids, weights), hidden)
    loss = 3 * fused_sparse_kd_loss(hidden, head, ids, weights)
    (found,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    torch.testing.assert_close(found, 3 * expected)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        torch.autograd.grad(loss, hidden)


# --- what the student does to its logits ---


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", LogitTransform()),
        ("gemma2", LogitTransform(cap=5.0)),
        ("cohere", LogitTransform(0.25)),
        ("granite", LogitTransform(1 / 8)),
    ],
)
def test_a_students_tail_is_measured_and_kept(family, expected):
    """The loss from the head's own inputs is the loss of the model's logits."""
    model = random_model(family)
    transform = logit_transform(model)
    assert transform == expected
    ids, head = torch.arange(20).reshape(1, 20) + 5, model.get_output_embeddings()
    kept = []
    handle = head.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
    model(input_ids=ids)
    handle.remove()
    targets = torch.randint(0, 1000, (20, M), generator=torch.Generator().manual_seed(0)), torch.full((20, M), 1 / M)
    fused = fused_sparse_kd_loss(kept[0][0], head, *targets, 8, transform=transform)
    expected = dense_loss(model(input_ids=ids).logits[0], *targets)
    assert_close(with_gradients(fused, head.weight), with_gradients(expected, head.weight))


@pytest.mark.parametrize("by_autocast", [True, False])
@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama", {}, LogitTransform()),
        ("llama", {"logit_scale": 0.995}, LogitTransform()),  # which it does not look at
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 30.0}, LogitTransform(cap=30.0)),
        ("vaultgemma", {"head_dim": 8, "final_logit_softcapping": 50.0}, LogitTransform(cap=50.0)),
        ("nanochat", {}, LogitTransform(cap=15.0)),
        ("cohere", {"logit_scale": 0.8333}, LogitTransform(0.8333)),
        ("cohere", {"logit_scale": 0.995}, LogitTransform(0.995)),
        ("granite", {"logits_scaling": 3.7}, LogitTransform(1 / 3.7)),
    ],
)
def test_a_tail_is_measured_in_16_bits(monkeypatch, family, options, expected, by_autocast):
    """Of a float32 model under autocast, and of a bfloat16 one."""
    monkeypatch.setitem(ARCHITECTURES, family, options)
    model = random_model(family)
    with torch.autocast("cpu", torch.bfloat16, enabled=by_autocast):
        assert logit_transform(model if by_autocast else model.bfloat16()) == expected


@pytest.mark.parametrize("entry, by", [(slice(None), 1), (0, -math.inf)])
def test_a_tail_that_is_not_known_is_refused_by_name(entry, by):
    class Shifted(torch.nn.Module):
        """A head whose output, or an entry of it, is shifted afterwards; by -inf it is ruled out, as padding."""

        def __init__(self, model):
            super().__init__()
            self.model, self.config, self.dtype = model, model.config, model.dtype
            self.get_output_embeddings = model.get_output_embeddings

        def forward(self, **inputs):
            output = self.model(**inputs)
            output.logits[..., entry] += by
            return output

    model = random_model("llama")
    with pytest.raises(ToolkitError, match="Shifted changes its lm_head's output"):
        logit_transform(Shifted(model))
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    with pytest.raises(ToolkitError, match="the lm_head of LlamaForCausalLM gives 0 for everything"):
        logit_transform(model)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 2.0}, r"temperature 2.0: expected 1\. .* at T = 2 the loss is 117% too large"),
        ({"reverse": True}, r"reverse: expected forward KL\. .* deviate by 2\.5 times their value"),
        ({"reduction": "none"}, "reduction 'none': expected one of mean, sum"),
        ({"entropy": torch.zeros(N, 1)}, "shapes of positions"),
    ],
)
def test_what_would_be_biased_or_does_not_fit_is_refused(case, options, message):
    hidden, head, ids, weights = case
    for loss, first in ((sparse_kd_loss, (head(hidden),)), (fused_sparse_kd_loss, (hidden, head))):
        with pytest.raises(UsageError, match=message):
            loss(*first, ids, weights, **options)


def test_ids_and_heads_that_do_not_fit_are_refused(case):
    hidden, head, ids, weights = case
    for outside in (-1, V):
        with pytest.raises(
            UsageError, match=f"token ids .*{outside}.*: expected 0 or more, and less than the {V} logits"
        ):
            sparse_kd_loss(head(hidden), ids.index_fill(1, torch.tensor([0]), outside), weights)
    with pytest.raises(UsageError, match="the head is a Sequential"):
        fused_sparse_kd_loss(hidden, torch.nn.Sequential(head), ids, weights)
    with pytest.raises(UsageError, match=r"hidden states \(13, 7\), a head \(50, 8\)"):
        fused_sparse_kd_loss(hidden[:, :7], head, ids, weights)
    with pytest.raises(UsageError, match="shapes of positions"):
        fused_sparse_kd_loss(hidden[1:], head, ids, weights)


# --- memory ---

POSITIONS, ROWS, WIDTH = 512, 151_936, 64


def _memory(sender, is_fused: bool) -> None:
    """Send what the peak was above what was held before, in MiB, in a process whose memory is its own."""
    torch.set_num_threads(1)
    weight = torch.randn(ROWS, WIDTH, requires_grad=True)
    hidden = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    ids, weights = torch.randint(0, ROWS, (POSITIONS, 81)), torch.full((POSITIONS, 81), 1 / 81)
    fused_sparse_kd_loss(hidden[:2], weight[:100], ids[:2] % 100, weights[:2]).backward()  # what a first call loads
    weight.grad = hidden.grad = None
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    if is_fused:
        fused_sparse_kd_loss(hidden, weight, ids, weights).backward()
    else:
        (-(weights * (hidden @ weight.T).log_softmax(dim=1).gather(1, ids)).sum(dim=1).mean()).backward()
    sender.send(_status("VmHWM") - before)


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def peak(is_fused: bool) -> float:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_memory, args=(sender, is_fused))
    process.start()
    sender.close()
    try:
        assert receiver.poll(600)
        return receiver.recv()
    finally:
        process.kill()
        process.join()


def test_memory_beyond_the_gradients():
    """At most 100 MiB beyond one copy of them, where log_softmax takes more than 800."""
    gradients = (ROWS + POSITIONS) * WIDTH * 4 / 2**20
    assert peak(is_fused=True) < gradients + 100
    assert peak(is_fused=False) > gradients + 800
