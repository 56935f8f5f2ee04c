"""Conversations that chat templates are tested with."""

# Model families render these differently: two templates count as the same if they render all of them alike.
_ASK, _ANSWER = {"role": "user", "content": " Hi 🙂\n"}, {"role": "assistant", "content": "\n Hello.\n"}
_THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
_REASONED = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
PROBES = (
    [_ASK, _ANSWER],
    [_ASK],
    [{"role": "system", "content": " Be brief. "}, _ASK, _ANSWER, _ASK, _ANSWER],
    [{"role": "system", "content": ""}, _ASK, _ANSWER],
    [_ASK, _THOUGHT],
    [_ASK, _THOUGHT, _ASK, _THOUGHT, _ASK],
    [_ASK, _REASONED, _ASK, _REASONED],
    [_ASK, {"role": "assistant", "content": ""}],
    [{"role": "system", "content": "One."}, {"role": "system", "content": "Two."}, _ASK, _ANSWER],
)
_CALL = {"type": "function", "id": "call00001", "function": {"name": "find", "arguments": {"near": True, "k": 2}}}
TOOL_PROBE: list[dict] = [
    _ASK,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
]  # a shipped template may refuse it

# What follows the first answer is the end of an answer that is not the last: FORMAT.md, "From a row to its tokens".
TWO_ANSWERS: list[dict] = [
    {"role": role, "content": word}
    for role, word in (("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four."))
]
