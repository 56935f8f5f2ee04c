"""README and docs/, as the tests read them: text, fenced blocks, the commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``number`` counts them."""

    page: Path
    number: int
    language: str
    text: str


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.M | re.S)
    return [Block(page, number, language, text) for number, (language, text) in enumerate(found)]


BLOCKS = {page.name: blocks_of(page) for page in PAGES}


def commands_in(block: str) -> list[list[str]]:
    """The commands of a block of shell, as words; comments and continued lines are the shell's.

    >>> commands_in("make demo  # two minutes\\nls \\\\\\n  -l 'a b'")
    [['make', 'demo'], ['ls', '-l', 'a b']]
    """
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
