"""Speakers: from the names that datasets use to the roles of chat templates."""

import re
from collections.abc import Callable, Collection

from chat_logits.data.templates import ChatTemplate, TemplateError

ALIASES = {
    "user": ("human", "prompter", "instruction", "question"),
    "assistant": ("gpt", "model", "bot", "chatgpt", "ai", "chatbot", "answer", "bing", "bard", "claude"),
    "system": ("developer",),
    "tool": ("function", "observation", "ipython", "function_response", "tool_response"),
}
ROLES = {alias: role for role, aliases in ALIASES.items() for alias in (role, *aliases)}
# A content to test whether a template shows it, and the same with its first, middle or last word changed to one of the
# same length and kinds of characters, but with no character in common. A template that changes case, removes characters
# or reverses the text still renders them differently; one that truncates the text does not.
SAID = "Xq7 seldom 3vK"
UNLIKE = ("Bw4 seldom 3vK", "Xq7 unfair 3vK", "Xq7 seldom 9zT")
ALL, PART, NOTHING = "all", "only a part", "nothing"
QUOTED = re.compile(r"""['"](\w+)['"]""")


def roles_named_in(template: str) -> frozenset[str]:
    """The quoted words in a chat template, which include the roles that it distinguishes.

    >>> sorted(roles_named_in("{% if message['role'] == 'developer' %}"))
    ['developer', 'role']
    """
    return frozenset(QUOTED.findall(template))


def words_of(template: str) -> frozenset[str]:
    """All words of a chat template, which include the message keys that it reads."""
    return frozenset(re.findall(r"\w+", template))


def to_role(speaker: object, template_roles: Collection[str] = ()) -> str | None:
    """The role of a speaker, None for an unknown one. A speaker that the template itself names keeps that name, unless
    it means the user or the assistant.

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
    """Raise TemplateError if the template, which rendered ``text``, does not show all of a message: no answer should
    be scored without its question.

    ``tools`` are the conversation's own. ``shown`` caches the results of ``shown_of_role``.
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
    """How much of a role's content a chat template shows, unchanged or changed: ``ALL``, ``PART`` or ``NOTHING``; None
    if that cannot be tested, as the test conversation is refused or renders differently each time.

    ``render`` gives a conversation's text, None if it is refused.
    """
    text = render(_probe(role, SAID))
    if text is None or SAID in text:
        return text and ALL
    return _compared(text, _probe(role, SAID), [_probe(role, said) for said in UNLIKE], render)


def _compared(
    text: str, conversation: list[dict], others: list[list[dict]], render: Callable[[list[dict]], str | None]
) -> str | None:
    """How many of the others render differently from the conversation: all, part or nothing; None if inconclusive."""
    texts = [render(other) for other in others]
    if None in texts or render(conversation) != text:
        return None
    changed = [other != text for other in texts]
    return ALL if all(changed) else PART if any(changed) else NOTHING


def _shown_of_message(
    conversation: list[dict], place: int, text: str, render: Callable[[list[dict]], str | None], of_role: str | None
) -> str:
    """How much a conversation's ``text`` depends on the content of its message at ``place``.

    If that cannot be tested, the result for the role is used; without one, whether the content is in the text.
    """
    message = conversation[place]
    is_there = message["content"].strip() in text
    if of_role == ALL and is_there:
        return ALL
    contents = [_unlike(message["content"])] if of_role == ALL else _unlike_by_word(message["content"])
    others = [[*conversation[:place], {**message, "content": other}, *conversation[place + 1 :]] for other in contents]
    return _compared(text, conversation, others, render) or of_role or (ALL if is_there else NOTHING)


def _unlike_by_word(text: str) -> list[str]:
    """The text with its first, its middle, or its last word changed: a text for each."""
    words = [word.span() for word in re.finditer(r"\S+", text)]
    chosen = {words[0], words[len(words) // 2], words[-1]}
    return [text[:start] + _unlike(text[start:end]) + text[end:] for start, end in sorted(chosen)]


def _unlike(text: str) -> str:
    """A text with the same lengths of words, in which every character differs, also apart from case."""
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
