"""Calls that fail in some processes of a group, which have this module from PYTHONPATH."""

from chat_logits.model.group import Group, in_step


@in_step
def fail_in(group: Group, ranks: tuple[int, ...], text: str) -> str:
    if group.rank in ranks:
        raise RuntimeError(text)
    return "done"
