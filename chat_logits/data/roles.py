"""Who speaks: the names that datasets have for it, as chat templates name it."""

import re
from collections.abc import Callable, Collection

from chat_logits.data.rendering import REASONING
from chat_logits.data.templates import ChatTemplate, TemplateError

ALIASES = {
    "user": ("human", "prompter", "instruction", "question"),
    "assistant": ("gpt", "model", "bot", "chatgpt", "ai", "chatbot", "answer", "bing", "bard", "claude"),
    "system": ("developer",),
    "tool": ("function", "observation", "ipython", "function_response", "tool_response"),
}
ROLES = {alias: role for role, aliases in ALIASES.items() for alias in (role, *aliases)}
# What is said to see whether a template shows it, and the same with its first, its middle and its last word changed,
# alike in length and kinds of characters but with none in common: a template that changes case, takes characters out or
# turns round still renders other texts, and one that cuts off does not.
SAID = "Xq7 seldom 3vK"
UNLIKE = ("Bw4 seldom 3vK", "Xq7 unfair 3vK", "Xq7 seldom 9zT")
ALL, PART, NOTHING = "all", "only a part", "nothing"
QUOTED = re.compile(r"""['"](\w+)['"]""")


def roles_named_in(template: str) -> frozenset[str]:
    """The words that a chat template has in quotes, among them the roles that it tells apart.

    >>> sorted(roles_named_in("{% if message['role'] == 'developer' %}"))
    ['developer', 'role']
    """
    return frozenset(QUOTED.findall(template))


def words_of(template: str) -> frozenset[str]:
    """All words of a chat template, among them the keys of messages that it reads. Names of thoughts are so as keys
    alone: some templates have a variable ``thinking``."""
    words = set(re.findall(r"\w+", template))
    return frozenset(word for word in words if word not in REASONING or re.search(rf"[.'\"]{word}\b", template))


def to_role(speaker: object, template_roles: Collection[str] = ()) -> str | None:
    """The role of a speaker, None for an unknown one. What the template names itself keeps its name, but for those who
    ask and answer.

    >>> to_role("Human"), to_role("developer"), to_role("developer", {"developer"}), to_role("narrator")
    ('user', 'system', 'developer', None)
    """
    if not isinstance(speaker, str):
        return None
    name = speaker.strip().lower()
    role = ROLES.get(name)
    if role not in ("user", "assistant") and speaker in template_roles:
        return speaker
    return role


def refuse_vanished(
    conversation: list[dict], tools: list[dict] | None, text: str, template: ChatTemplate, shown: dict
) -> None:
    """Raise TemplateError where the template, whose ``text`` this is, does not show all of a message, so that no answer
    is scored without its question.

    ``tools`` are the conversation's own. ``shown`` keeps what ``shown_of_role`` says.
    """
    template = template.with_tools(tools)
    for place, message in enumerate(conversation):
        role = message["role"]
        if role == "assistant" or not (message.get("content") or "").strip():
            continue
        asked = f"{role} with definitions" if tools else role
        if asked not in shown:
            shown[asked] = shown_of_role(role, template.text_or_none)
        found = shown[asked]
        if found not in (PART, NOTHING):
            found = _shown_of_message(conversation, place, text, template.text_or_none, found)
        if found != ALL:
            raise TemplateError(f"a turn of role {role!r}, of which the chat template shows {found}")


def shown_of_role(role: str, render: Callable[[list[dict]], str | None]) -> str | None:
    """How much a chat template shows of what this role says, as it stands or changed: ``ALL``, ``PART`` or ``NOTHING``;
    None where that cannot be asked: the conversation asked with is refused, or renders otherwise each time.

    ``render`` gives a conversation's text, None where it is refused.
    """
    text = render(_probe(role, SAID))
    if text is None or SAID in text:
        return text and ALL
    return _compared(text, _probe(role, SAID), [_probe(role, said) for said in UNLIKE], render)


def _compared(
    text: str, conversation: list[dict], others: list[list[dict]], render: Callable[[list[dict]], str | None]
) -> str | None:
    """How many of the others give another text than the conversation's, None where that proves nothing."""
    texts = [render(other) for other in others]
    if None in texts or render(conversation) != text:
        return None
    changed = [other != text for other in texts]
    return ALL if all(changed) else PART if any(changed) else NOTHING


def _shown_of_message(
    conversation: list[dict], place: int, text: str, render: Callable[[list[dict]], str | None], of_role: str | None
) -> str:
    """How much a conversation's ``text`` depends on what its message at ``place`` says.

    Where that cannot be asked it is what is known of the role; where nothing is known, the words are looked up in the
    text.
    """
    message = conversation[place]
    is_there = message["content"].strip() in text
    if of_role == ALL and is_there:
        return ALL
    contents = [_unlike(message["content"])] if of_role == ALL else _unlike_by_word(message["content"])
    others = [[*conversation[:place], {**message, "content": other}, *conversation[place + 1 :]] for other in contents]
    return _compared(text, conversation, others, render) or of_role or (ALL if is_there else NOTHING)


def _unlike_by_word(text: str) -> list[str]:
    """The text with its first, its middle, and its last word changed."""
    words = [word.span() for word in re.finditer(r"\S+", text)]
    chosen = {words[0], words[len(words) // 2], words[-1]}
    return [text[:start] + _unlike(text[start:end]) + text[end:] for start, end in sorted(chosen)]


def _unlike(text: str) -> str:
    """A text of the same length and words, each character another one, whatever its case."""
    return re.sub(r"\S", lambda found: "y" if found[0] in "xX" else "x", text)


def _probe(role: str, content: str) -> list[dict]:
    said, ask, answer = (
        {"role": who, "content": text} for who, text in ((role, content), ("user", "Hi"), ("assistant", "Yes."))
    )
    if role in ("system", "developer"):
        return [said, ask, answer]
    if role == "user":
        return [said, answer]
    call = {"type": "function", "id": "call00001", "function": {"name": "find", "arguments": {"k": 2}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [ask, calling, {**said, "name": "find", "tool_call_id": "call00001"}, answer]
