"""Marks on messages for turns that are not to be trained on: their tokens are not extracted.

``weight`` is OpenAI's and Mistral's, ``train`` axolotl's, ``loss`` ms-swift's: an answer with 0 or false is left out.
"""

from chat_logits.data.conversations import ConversationError, NothingToExtract
from chat_logits.data.templates import TemplateError

MARKS = ("weight", "train", "loss")
ALL_LEFT_OUT = f"every answer is marked not to be trained on ({', '.join(MARKS)})"


def left_out_spans(conversation: list[dict], spans: list[tuple[int, int]]) -> frozenset[int]:
    """Which of a rendering's spans, one per turn of the assistant, are marked not to be trained on.

    Raises ConversationError if a mark is not valid, TemplateError if the number of spans is not that of the turns, and
    NothingToExtract if no turn is left.
    """
    answers = [message for message in conversation if message["role"] == "assistant"]
    marked = frozenset(i for i, answer in enumerate(answers) if is_left_out(answer))
    if not marked:
        return marked
    if len(marked) == len(answers):
        raise NothingToExtract(ALL_LEFT_OUT)
    if len(spans) != len(answers):
        raise TemplateError(
            f"answers are marked not to be trained on, but the chat template has {len(spans)} turns for {len(answers)}"
        )
    return marked


def is_left_out(message: dict) -> bool:
    """Whether a message is marked not to be trained on. Raises ConversationError if marks are not valid or contradict.

    >>> is_left_out({"weight": 0}), is_left_out({"train": True}), is_left_out({"role": "assistant"})
    (True, False, False)
    """
    values = {name: message[name] for name in MARKS if message.get(name) is not None}
    for name, value in values.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ConversationError(f"an answer with {name} {value!r:.40}, expected 0 or 1, false or true")
    if len(set(map(bool, values.values()))) > 1:
        raise ConversationError(f"an answer whose marks contradict each other: {', '.join(values)}")
    return not all(values.values())
