"""Source rows to aligned conversations while the model runs: in the thread that reads them, or in other processes.

Rendering and alignment are Python code: threads would have to take turns, also with the thread that launches kernels.
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
    """Where rows are aligned, ``ahead`` shards at once in addition to the one that the model computes."""

    ahead: int

    def submit(self, first: int, rows: list) -> Future:
        """``Reader.align_rows`` of these source rows, beginning at ``first``."""

    def close(self) -> None:
        """Stop, even during work."""


def start_aligning(reader: Reader, processes: int) -> Aligning:
    """Align in so many processes; in the calling thread if it is one, or if the reader cannot be pickled."""
    try:
        return AlignProcesses(reader, processes) if processes > 1 else AlignHere(reader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # such as a tokenizer with its own code
        logger.info("Rows are aligned in this process, as their reader cannot be sent to others: %s", error)
        return AlignHere(reader)


class AlignHere:
    """Aligns in the thread that submits the rows."""

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
    """Aligns in processes that have the reader without its source; a thread here waits for each."""

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
