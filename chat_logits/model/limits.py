"""A model's configuration without its weights, and what the model can read. Nothing here needs torch."""

from dataclasses import dataclass

from chat_logits.errors import ToolkitError
from chat_logits.hub_errors import explain_loading

# The names that configurations use for the most tokens that a model can read.
LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "max_target_positions",
    "context_length",
    "model_max_length",
)


@dataclass(frozen=True)
class InputLimits:
    """What the model can read: ids below ``vocab_size``, and at most ``positions`` tokens (None: no limit is given)."""

    vocab_size: int
    positions: int | None


def input_limits(config) -> InputLimits:
    """The limits in a model's configuration. Raises ToolkitError for a model with an encoder, or without a
    vocabulary."""
    if config.is_encoder_decoder:
        raise ToolkitError(
            f"model type {config.model_type}: an encoder reads its prompts, so a conversation is not one text to it. "
            "Expected a decoder-only model, such as Llama, Qwen or Gemma."
        )
    text = config.get_text_config()
    vocab_size = getattr(text, "vocab_size", None)
    if type(vocab_size) is not int:
        raise ToolkitError(
            f"model type {config.model_type}: its configuration has no vocab_size, so it reads no text. Expected a "
            "causal language model, such as Llama, Qwen or Gemma."
        )
    return InputLimits(vocab_size, most_positions(text))


def most_positions(text_config) -> int | None:
    """The most tokens that a text model can read by its configuration: the least value there, None if there is none."""
    named = [getattr(text_config, name, None) for name in LENGTHS]
    return min((length for length in named if type(length) is int and length > 0), default=None)


def load_config(
    model_id: str, revision: str | None = None, gguf_file: str | None = None, trust_remote_code: bool = False
):
    """The model's configuration, without its weights."""
    from transformers import AutoConfig

    return from_pretrained(AutoConfig, model_id, revision, gguf_file, trust_remote_code=trust_remote_code)


def from_pretrained(auto_class, model_id: str, revision: str | None, gguf_file: str | None, **options):
    """What the auto class loads. Raises ToolkitError, or UsageError if the model comes with code that may not run."""
    if gguf_file:
        options["gguf_file"] = gguf_file
    try:
        return auto_class.from_pretrained(model_id, revision=revision, **options)
    except ImportError as error:
        needs = "GGUF files need pip install 'gguf>=0.19' 'accelerate>=1.15'" if gguf_file else str(error)
        raise ToolkitError(f"model {model_id}: {needs}") from error
    except Exception as error:
        raise explain_loading(error, f"model {model_id}") from error
