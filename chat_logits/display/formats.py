"""Numbers as text, the same in terminals and on pages."""

from chat_logits.analysis.tokens import Prediction, TokenAnalysis
from chat_logits.display.text import quoted

TAIL = "tail"  # instead of a rank


def short_probability(probability: float) -> str:
    """Two digits of a probability; one that is too small for a float is 0.

    >>> short_probability(0.854), short_probability(0.00042), short_probability(0.0)
    ('0.85', '4e-04', '0')
    """
    return f"{probability:.2f}" if probability >= 0.005 else f"{probability:.0e}" if probability else "0"


def chosen_text(count: int, chosen_from: int | None) -> str:
    """How many conversations, and of how many they were chosen, if they were.

    >>> chosen_text(1200, None), chosen_text(12, 1200)
    ('1,200', '12 chosen of 1,200')
    """
    return f"{count:,}" if chosen_from is None else f"{count:,} chosen of {chosen_from:,}"


def chosen_parts(chosen_from: int | None) -> list[str]:
    """That the conversations of a comparison were chosen, if they were."""
    return [] if chosen_from is None else [f"chosen of the first's {chosen_from:,}"]


def short_perplexity(perplexity: float) -> str:
    """A perplexity in at most ten characters."""
    return f"{perplexity:,.2f}" if perplexity < 999_999.995 else f"{perplexity:.1e}"


def short_nats(nats: float, sign: str = "") -> str:
    """A logarithm in at most seven characters; that of a masked token can be −10³⁸.

    >>> short_nats(-12.345), short_nats(-3.4e38), short_nats(0.5, "+")
    ('-12.35', '-3e+38', '+0.50')
    """
    return f"{nats:{sign}.2f}" if abs(nats) < 999.5 else f"{nats:{sign}.0e}"


def entropy_text(nats: float, is_bound: bool) -> str:
    """An entropy in nats, with ≥ if it is a lower bound."""
    return f"{'≥ ' if is_bound else ''}{nats:.2f} nats"


def rank_text(token: TokenAnalysis) -> str:
    """The target token's rank, or "tail" if it is not among the stored most probable ones."""
    return str(token.rank) if token.rank else TAIL


def prediction_text(prediction: Prediction | None) -> str:
    """A prediction as text, ``"The"(0.85)``; "" for None."""
    return f"{quoted(prediction.text)}({short_probability(prediction.probability)})" if prediction else ""
