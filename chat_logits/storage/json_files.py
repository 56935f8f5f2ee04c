"""Reading and writing the JSON files of a logit dataset."""

import json
import math
from pathlib import Path

from chat_logits.errors import ToolkitError

SHOWN = 40  # characters of a value in a message
LARGEST = 2**29  # bytes of a file that is read; a list of 100,000 shards has 20 million


def canonical(value: object) -> bytes:
    """Canonical JSON as FORMAT.md defines it: sorted keys, no spaces, UTF-8. Raises ValueError for NaN and infinite
    numbers, which JSON does not have."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode(errors="surrogatepass")


def json_text(content: dict) -> str:
    """JSON for people to read. Raises ValueError as ``canonical``."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path, name: str) -> dict:
    """The JSON object in a file that messages call ``name``. Raises ToolkitError for anything else."""
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise ToolkitError(f"{name} has {size:,} bytes, expected {LARGEST:,} at most")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ToolkitError(f"{name} is not JSON: {error}") from error
    except OSError as error:
        raise ToolkitError(f"{name} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise ToolkitError(f"{name} does not hold a JSON object")
    return content


def _finite(number: str) -> float:
    """The value of a number with a fraction or an exponent. Raises ValueError for NaN and Infinity, which Python would
    accept."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number:.{SHOWN}} is not a finite number")
    return value
