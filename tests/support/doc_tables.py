"""The tables of options in docs/, made from the options themselves.

python tests/support/doc_tables.py    # writes them anew
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from chat_logits.cli import explore_options, export_options, extract_options, train_options  # noqa: E402
from chat_logits.cli.parser import example_of  # noqa: E402
from chat_logits.options import EXTRACTED, READ, SPREAD, WRITTEN, Option, options_of  # noqa: E402
from chat_logits.training.config import TAUGHT  # noqa: E402

PAGES = {
    "extract": REPO / "docs" / "extracting.md",
    "explore": REPO / "docs" / "exploring.md",
    "export": REPO / "docs" / "training.md",
    "train": REPO / "docs" / "training.md",
}


def tables(name: str) -> str:
    """The tables of a command's options, one a group of its help, as Markdown."""
    modules = {"extract": extract_options, "explore": explore_options, "export": export_options, "train": train_options}
    options = [one for kind in modules[name].KINDS for one in options_of(kind).values()]
    groups = [group for group in dict.fromkeys(one.group for one in options) if group]
    order = (READ, TAUGHT, EXTRACTED, WRITTEN, SPREAD, *groups)
    ordered = [*sorted(groups, key=order.index), ""]  # those of the command itself come last
    return "\n".join(_table(group, [one for one in options if one.group == group]) for group in ordered)


def _table(group: str, options: Iterable[Option]) -> str:
    lines = [f"| {group or 'option'} | |", "| --- | --- |"]
    for one in sorted(options, key=lambda one: not one.is_basic):
        name = f"--{'no_' if one.kind is bool and one.default is True else ''}{one.name}"
        value = "" if one.kind is bool else f" {one.metavar or ','.join(one.choices)}"
        text = f"{'do not ' if one.kind is bool and one.default is True else ''}{one.full_help}".replace("|", "\\|")
        basic = f"; e.g. `{example_of(one)}`" if one.is_basic else ""
        lines.append(f"| `{name}{value}` | {text}{basic} |")
    return "\n".join(lines) + "\n"


def with_tables(page: str, name: str) -> str:
    """The page's text with its tables as they should be."""
    return re.sub(
        rf"(<!-- table: {name} -->\n).*?(?=<!-- end -->)", lambda found: found[1] + tables(name), page, flags=re.S
    )


if __name__ == "__main__":
    for name, path in PAGES.items():
        path.write_text(with_tables(path.read_text(encoding="utf-8"), name), encoding="utf-8")
