"""What the Hub on loopback does wrong: faults on demand, or drawn at random from a seed."""

import random
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

KINDS = ("refuse", "cut", "lost", "slow", "conflict", "stall", "drip", "stray")
WRITE_STEPS = ("preupload", "lfs_batch", "lfs_put", "commit")
READ_STEPS = ("info", "tree")
PASSING_STATUSES = (429, 500, 502, 503, 504)


@dataclass
class Fault:
    """What goes wrong with the next `times` matching requests, once `skip` of them have passed.

    refuse    answers `status` and `headers` without carrying out the call
    cut       reads half of the body, carries out nothing, and closes the connection
    lost      carries out the call and closes the connection instead of answering
    slow      carries out the call and answers `seconds` later
    conflict  lets somebody else's commit land first, on the branch that the call is about
    stray     answers with a page, as a network does that wants a login
    drip      carries out the call and answers a byte every `seconds`
    stall     neither carries out the call nor answers, until the client or the hub hangs up
    """

    kind: str
    on: str  # a step ("preupload", "lfs_batch", "lfs_put", "commit", "info", ...), or a regex with a "/" for the path
    method: str = ""  # any
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.2
    times: float = 1  # math.inf: every time
    skip: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind} is none of {KINDS}")

    def matches(self, step: str, method: str, path: str) -> bool:
        found = re.search(self.on, path) if "/" in self.on else self.on == step
        return bool(found) and self.method in ("", method)

    def strikes(self) -> bool:
        """Count one matching request, and say whether this is one to hit."""
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return self.times >= 0


class RandomFaults:
    """Faults by lot. Each step has its own dice, so that the turn of another step shifts no draw."""

    def __init__(self, seed: int, rate: float, steps: Iterable[str], kinds: Iterable[str]) -> None:
        self._rate, self._kinds = rate, tuple(kinds)
        self._dice = {step: random.Random(f"{seed} {step}") for step in steps}

    def draw(self, step: str) -> Fault | None:
        dice = self._dice.get(step)
        if dice is None or dice.random() >= self._rate:
            return None
        kinds = [kind for kind in self._kinds if kind != "conflict" or step == "commit"]
        return self._make(step, dice.choice(kinds), dice) if kinds else None

    @staticmethod
    def _make(step: str, kind: str, dice: random.Random) -> Fault:
        headers = dice.choice(({}, {"Retry-After": "0"}, {"Retry-After": "1"}))
        status, seconds = dice.choice(PASSING_STATUSES), dice.uniform(0.01, 0.2)
        return Fault(kind, step, status=status, headers=headers, seconds=seconds)


class Faults:
    """All that is to go wrong: what was ordered comes before what is drawn."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ordered: list[Fault] = []
        self._random: RandomFaults | None = None

    def order(self, faults: Iterable[Fault]) -> None:
        with self._lock:
            self._ordered += [replace(fault) for fault in faults]  # copies, because they count down

    def draw_from(self, source: RandomFaults | None) -> None:
        with self._lock:
            self._random = source

    def clear(self) -> None:
        with self._lock:
            self._ordered, self._random = [], None

    def strike(self, step: str, method: str, path: str) -> Fault | None:
        """The fault that hits this request."""
        with self._lock:
            for fault in self._ordered:
                if fault.matches(step, method, path) and fault.strikes():
                    return fault
            return self._random.draw(step) if self._random else None
