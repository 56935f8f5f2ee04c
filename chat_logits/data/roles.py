"""Who speaks: the names that datasets have for it, as chat templates name it."""

import re
from collections.abc import Callable, Collection

ALIASES = {
    "user": ("human", "prompter", "instruction", "question"),
    "assistant": ("gpt", "model", "bot", "chatgpt", "ai", "chatbot", "answer", "bing", "bard", "claude"),
    "system": ("developer",),
    "tool": ("function", "observation", "ipython", "function_response", "tool_response"),
}
ROLES = {alias: role for role, aliases in ALIASES.items() for alias in (role, *aliases)}
SENTINEL = "Xq7 seldom 3vK"
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


def leaves_trace(role: str, render: Callable[[list[dict]], str | None]) -> bool | None:
    """Whether a chat template shows what this role says, None where it refuses the conversation asked with.

    ``render`` gives a conversation's text, None where it is refused.
    """
    text = render(_probe(role))
    return None if text is None else SENTINEL in text


def _probe(role: str) -> list[dict]:
    said, ask, answer = (
        {"role": who, "content": text} for who, text in ((role, SENTINEL), ("user", "Hi"), ("assistant", "Yes."))
    )
    if role in ("system", "developer"):
        return [said, ask, answer]
    if role == "user":
        return [said, answer]
    call = {"type": "function", "id": "call00001", "function": {"name": "find", "arguments": {"k": 2}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [ask, calling, {**said, "name": "find", "tool_call_id": "call00001"}, answer]
