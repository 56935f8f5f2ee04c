"""Source rows to aligned conversations beside the model: in the thread that reads them, or in processes of their own.

Rendering and alignment are Python's work: in threads they would take turns, and the model's launches with them.
"""

import logging
import pickle
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol, cast

from chat_logits.data.reader import Reader
from chat_logits.data.source import SourceDataset
from chat_logits.helpers import Helpers

logger = logging.getLogger(__name__)

NO_SOURCE = cast(SourceDataset, None)  # rows come from the process that reads them


class Aligning(Protocol):
    """Where rows are aligned, ``ahead`` shards at once beside the one that the model computes."""

    ahead: int

    def submit(self, first: int, rows: list) -> Future:
        """``Reader.align_rows`` of these source rows, beginning at ``first``."""

    def close(self) -> None:
        """End, whatever is under way."""


def start_aligning(reader: Reader, processes: int) -> Aligning:
    """Align in so many processes; in the calling thread where it is one, or the reader cannot go to others."""
    try:
        return AlignProcesses(reader, processes) if processes > 1 else AlignHere(reader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # of a tokenizer with code of its own, say
        logger.info("Rows are aligned in this process, as their reader cannot go to others: %s", error)
        return AlignHere(reader)


class AlignHere:
    """In the thread that submits the rows."""

    ahead = 1

    def __init__(self, reader: Reader):
        self._reader = reader

    def submit(self, first: int, rows: list) -> Future:
        done: Future = Future()
        done.set_result(self._reader.align_rows(first, rows))
        return done

    def close(self) -> None:
        pass


class AlignProcesses:
    """In processes that know the reader but for its source, each asked by a thread here."""

    def __init__(self, reader: Reader, processes: int):
        self.ahead = processes + 1
        known = replace(reader, source=NO_SOURCE, first_ready=[], first_skipped=[])
        self.helpers = Helpers(processes, "aligns conversations", known.align_rows)
        self._asking = ThreadPoolExecutor(processes, "align")

    def submit(self, first: int, rows: list) -> Future:
        return self._asking.submit(self.helpers.ask, first, rows)

    def close(self) -> None:
        self.helpers.close()
        self._asking.shutdown(cancel_futures=True)
