"""Who speaks: the names that datasets have for it, as chat templates name it."""

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
# Alike in length, words and kinds of characters, but with no character in common: a template that changes case, takes
# characters out, turns round or cuts off still renders two texts.
SENTINELS = ("Xq7 seldom 3vK", "Bw4 unfair 9zT")
QUOTED = re.compile(r"""['"](\w+)['"]""")


def roles_named_in(template: str) -> frozenset[str]:
    """The words that a chat template has in quotes, among them the roles that it tells apart.

    >>> sorted(roles_named_in("{% if message['role'] == 'developer' %}"))
    ['developer', 'role']
    """
    return frozenset(QUOTED.findall(template))


def words_of(template: str) -> frozenset[str]:
    """All words of a chat template, among them the keys of messages that it reads."""
    return frozenset(re.findall(r"\w+", template))


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
    """Raise TemplateError where the template, whose ``text`` this is, shows nothing of a message, so that no answer is
    scored without its question.

    ``tools`` are the conversation's own. ``shown`` keeps what ``leaves_trace`` says of roles.
    """
    template = template.with_tools(tools)
    for place, message in enumerate(conversation):
        role = message["role"]
        if role == "assistant" or not (message.get("content") or "").strip():
            continue
        asked = f"{role} with definitions" if tools else role
        if asked not in shown:
            shown[asked] = leaves_trace(role, template.text_or_none)
        is_shown = shown[asked]
        if is_shown is None:
            is_shown = _is_shown_in(conversation, place, text, template.text_or_none)
        if not is_shown:
            raise TemplateError(f"a turn of role {role!r}, of which the chat template shows nothing")


def leaves_trace(role: str, render: Callable[[list[dict]], str | None]) -> bool | None:
    """Whether a chat template shows what this role says, as it stands or changed; None where that cannot be asked: the
    conversation asked with is refused, or renders otherwise each time.

    ``render`` gives a conversation's text, None where it is refused.
    """
    probes = [_probe(role, said) for said in SENTINELS]
    texts, again = ([text for probe in probes if (text := render(probe)) is not None] for _ in range(2))
    if len(texts) < len(probes):
        return None
    if all(said in text for said, text in zip(SENTINELS, texts, strict=True)):
        return True
    return texts[0] != texts[1] if texts == again else None


def _is_shown_in(conversation: list[dict], place: int, text: str, render: Callable[[list[dict]], str | None]) -> bool:
    """Whether a conversation's ``text`` depends on what its message at ``place`` says; looked up in it where the
    template refuses another one, or renders otherwise each time."""
    message = conversation[place]
    other = {**message, "content": _unlike(message["content"])}
    otherwise = render([*conversation[:place], other, *conversation[place + 1 :]])
    if otherwise is None or render(conversation) != text:
        return message["content"].strip() in text
    return otherwise != text


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
