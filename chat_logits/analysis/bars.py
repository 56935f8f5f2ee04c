"""Progress bars on stderr, which a caller may turn off."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_kept_back: ContextVar[bool | None] = ContextVar("kept_back", default=None)


def bar(rows: Iterable, *options: Any, **more: Any) -> tqdm:
    """``tqdm`` over these rows, drawn unless bars are kept back."""
    return tqdm(rows, *options, **more, disable=bool(_kept_back.get()))


@contextmanager
def bars_kept_back(kept_back: bool) -> Iterator[None]:
    """Within, no bar is drawn if ``kept_back``; when nested, the outer one decides."""
    outer = _kept_back.get()
    token = _kept_back.set(kept_back if outer is None else outer)
    try:
        yield
    finally:
        _kept_back.reset(token)
