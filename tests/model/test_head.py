"""The lm_head's output in float32: against float64 products of the model's own hidden states and weights."""

import pytest
import torch
from conftest import MODEL, make_tiny_model
from random_models import random_model

from chat_logits.errors import ToolkitError
from chat_logits.model import loading
from chat_logits.model.head import use_head_dtype
from chat_logits.model.loading import logits_dtype

IDS = torch.randint(0, 1000, (2, 30), generator=torch.Generator().manual_seed(0))


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL(p || q) in nats, of log-probabilities (n, V)."""
    return (p.exp() * (p - q)).sum(dim=1).mean().item()


@torch.inference_mode()
def log_probs(model, alignments) -> torch.Tensor:
    """Of the extracted tokens' positions, a conversation at a time."""
    rows = [model(torch.from_numpy(a.input_ids)[None]).logits[0, a.positions - 1] for a in alignments]
    return torch.cat(rows).double().log_softmax(dim=1)


def test_what_rounding_logits_costs(smollm2, real_alignments):
    """SmolLM2 in bfloat16, real answers: 4.3e-4 nats of KL over 12 conversations, 0.021 nats of a target's
    log-probability, and a third of the distance from the model in float32."""
    some = real_alignments[:4]
    whole = log_probs(smollm2[0], some)
    own, wide = (
        log_probs(loading.load_model(str(MODEL), dtype="bfloat16", head_dtype=head_dtype), some)
        for head_dtype in ("model", "float32")
    )
    targets = torch.cat([torch.from_numpy(a.input_ids[a.positions]) for a in some])[:, None]
    moved = (own.gather(1, targets) - wide.gather(1, targets)).abs().mean().item()
    assert 2e-4 < kl(wide, own) < 8e-4
    assert 0.01 < moved < 0.04
    assert kl(whole, wide) < 0.85 * kl(whole, own)


@torch.inference_mode()
def exact_logits(model) -> torch.Tensor:
    """The float64 product of the model's hidden states and its lm_head, with what the family does to it."""
    hidden = model.model(IDS, use_cache=False).last_hidden_state.double()
    logits = hidden @ model.get_output_embeddings().weight.double().T
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        return cap * torch.tanh(logits / cap)
    return logits * (getattr(model.config, "logit_scale", None) or 1.0) / getattr(model.config, "logits_scaling", 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
def test_logits_are_those_of_exact_sums(family, dtype, tmp_path):
    """Sums, output and the model's own tail: bfloat16 rounds these logits by up to 0.1."""
    random_model(family).save_pretrained(tmp_path)
    model = loading.load_model(str(tmp_path), dtype=str(dtype).removeprefix("torch."))
    assert logits_dtype(model) == "float32"
    exact = exact_logits(model)
    with torch.inference_mode():
        found = model(IDS, use_cache=False).logits
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


def test_the_models_own_head_stays_on_demand(tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    model = loading.load_model(str(tmp_path), dtype="bfloat16", head_dtype="model")
    assert logits_dtype(model) == "bfloat16"
    assert (model(IDS).logits - exact_logits(model)).abs().max() > 1e-3


def test_nothing_changes_for_a_model_in_float32(tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    plain, wide = (loading.load_model(str(tmp_path), head_dtype=dtype) for dtype in ("model", "float32"))
    with torch.inference_mode():
        assert torch.equal(plain(IDS).logits, wide(IDS).logits)


def test_a_bias_is_added_in_float32():
    head = torch.nn.Linear(8, 20).bfloat16()
    states, model = torch.randn(3, 8).bfloat16(), Model(head)
    use_head_dtype(model, None)
    exact = states.double() @ head.weight.double().T + head.bias.double()
    assert (head(states) - exact).abs().max() < 1e-6


class Model(torch.nn.Module):
    """All that ``use_head_dtype`` asks of a model."""

    dtype = torch.bfloat16

    def __init__(self, head):
        super().__init__()
        self.get_output_embeddings = lambda: head


def test_a_head_that_is_no_plain_matrix_keeps_its_own_dtype():
    class Scaled(torch.nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    head = Scaled(8, 20).bfloat16()
    use_head_dtype(Model(head), None)
    assert head(torch.randn(3, 8).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ToolkitError, match=r"lm_head is a Scaled.*give `head_dtype` model"):
        use_head_dtype(Model(head), "float32")


def test_a_spread_model_has_the_same_head(tmp_path):
    """Its weights on disk: accelerate brings them for the time the head works."""
    folder = str(make_tiny_model(tmp_path / "model", vocab_size=4096))
    plain = loading.load_model(folder, dtype="bfloat16")
    options = {"device_map": "auto", "max_memory": {"cpu": 0}, "offload_folder": tmp_path / "offload"}
    spread = loading.load_model(folder, dtype="bfloat16", **options)
    with torch.inference_mode():
        there, here = (model(IDS, use_cache=False).logits for model in (spread, plain))
    assert there.dtype == torch.float32
    assert spread.get_input_embeddings().weight.is_meta and logits_dtype(spread) == "float32"
    assert (there - here).abs().max() < 1e-4 * here.abs().max()
