"""Findings as JSON that every reader takes: dataclasses as objects, arrays as lists, no NaN, no lone surrogates."""

import json
import math
from dataclasses import asdict, is_dataclass

import numpy as np


def plain(value):
    """The value as dicts, lists, strings, numbers, booleans and None. Infinite numbers are None."""
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return value.encode(errors="surrogateescape").decode(errors="replace")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value) -> str:
    """JSON for people to read."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n"
