"""README and docs/ name what is there: options, files, links, templates, rooms."""

import re
from pathlib import Path

import doc_tables
import pytest
from doc_pages import PAGES, REPO, text_of

from chat_logits.cli import explore_options, export_options, extract_options, train_options

README_BYTES = 9_000


@pytest.mark.parametrize("name", doc_tables.PAGES)
def test_tables_of_options_are_the_options(name):
    page = text_of(doc_tables.PAGES[name])
    assert page == doc_tables.with_tables(page, name), "python tests/support/doc_tables.py writes them anew"
    assert page.count("\n| `--") >= 15


def test_options_that_are_named_exist():
    known = {"--head", "--port", "--address", "--nproc_per_node", "--array", "--gpus"}  # of ray start, torchrun, sbatch
    for options in (extract_options, explore_options, export_options, train_options):
        known |= {option for action in options.build_parser()._actions for option in action.option_strings}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text_of(page)))
        spelled = {"--" + name[2:].replace("-", "_") for name in named}
        assert spelled <= known, page.name


def test_files_that_are_named_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:chat_logits|benchmarks|demo|tests|docs|templates)/[\w/.-]+\.\w+)", text_of(page)):
            assert (REPO / name).is_file(), f"{page.name}: {name}"
        for name in re.findall(r"`(chat_logits(?:\.\w+)+)", text_of(page)):
            path = REPO / name.replace(".", "/")
            assert path.with_suffix(".py").is_file() or path.parent.with_suffix(".py").is_file(), f"{page.name}: {name}"


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for page in [*PAGES, REPO / "FORMAT.md", REPO / "benchmarks" / "RESULTS.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors_of(path), f"{page.name}: {target}"


def test_the_readme_is_short():
    assert len((REPO / "README.md").read_bytes()) <= README_BYTES


def test_every_template_is_in_the_table_and_none_that_is_not_there():
    named = re.findall(r"`([a-z]\w+)`", "".join(re.findall(r"^\|.*\|$", text_of(REPO / "docs" / "templates.md"), re.M)))
    assert sorted(named) == sorted(path.stem for path in (REPO / "templates").glob("*.jinja"))
    assert f"one of the {len(named)} [templates]" in text_of(REPO / "README.md")


def test_every_module_has_its_place_in_the_table_of_rooms():
    page = text_of(REPO / "docs" / "architecture.md")
    modules = {
        path.relative_to(REPO).as_posix() for path in (REPO / "chat_logits").rglob("*.py") if path.stem != "__init__"
    }
    named = {
        f"chat_logits/{room}{name}.py" if room else f"chat_logits/{name}.py"
        for room, names in re.findall(r"^\| `chat_logits/(\w+/)?` \|.*?\|(.*?)\|", page, re.M)
        for name in re.findall(r"`(\w+)`", names)
    }
    assert named == modules
