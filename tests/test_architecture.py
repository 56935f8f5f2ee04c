"""The rooms of the package, by the imports that its files have: data goes up the rooms and never back."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import REPO

from chat_logits.data import templates
from chat_logits.extraction import cluster

COMMANDS = ("extract_logits", "explore_logits", "export_targets", "train_student")
BASE = (
    "logit_codec",
    "chat_logits",
    "chat_logits.errors",
    "chat_logits.helpers",
    "chat_logits.hub",
    "chat_logits.hub_errors",
    "chat_logits.machine",
    "chat_logits.options",
    "chat_logits.paths",
    "chat_logits.pipes",
    "chat_logits.scratch",
    "chat_logits.stages",
    "chat_logits.words",
)
ROOMS = ("data", "model", "storage", "extraction", "analysis", "training", "display", "browse", "cli")  # lowest first
FLAG = re.compile(r"--[a-z]")
FLAGS_ELSEWHERE = {
    # Datasets and their shards have these texts in them, which stay as they are.
    "chat_logits.data.alignment": {"--skip_tokens"},
    "chat_logits.data.template_choice": {"generation blocks of --chat_template"},
    "chat_logits.data.templates": {templates.THREE_WAYS},
    # Commands of Ray and torch have these.
    "chat_logits.extraction.cluster": {"--address", cluster.START},
    "chat_logits.training.student": {"torchrun --nproc_per_node"},
}
UNKNOWN_TO = {  # packages and lower rooms that a room does without
    "data": {"torch", "argparse", "rich"},
    "model": {"pyarrow", "datasets", "huggingface_hub", "argparse", "rich"},
    "storage": {"torch", "transformers", "jinja2", "argparse", "rich"},
    "extraction": {"argparse", "rich"},
    "analysis": {"argparse", "rich", "jinja2"},
    "training": {"extraction", "argparse", "rich", "jinja2"},
    "display": {"torch", "transformers", "huggingface_hub", "argparse"},
    "browse": {"torch", "transformers", "huggingface_hub", "argparse", "rich"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in (*REPO.glob("*.py"), *REPO.glob("chat_logits/**/*.py"))}


def imports_of(module: str) -> set[str]:
    """Modules of the repository in full, and packages of others by their first name, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: expected absolute imports"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            names |= inner if len(inner) == len(node.names) else inner | {node.module}
    return {name if name in FILES else name.partition(".")[0] for name in names}


IMPORTS = {module: imports_of(module) for module in FILES}


def room_of(module: str) -> int:
    """The base is lowest, and the codec, which can be copied out alone, below it; the commands are highest."""
    if module in COMMANDS:
        return len(ROOMS)
    if module in BASE:
        return -1 if module.startswith("chat_logits") else -2
    return ROOMS.index(module.split(".")[1])


def is_refused(module: str, imported: str) -> bool:
    room = module.split(".")[1] if module.count(".") > 1 else ""
    if imported not in FILES:
        return imported in UNKNOWN_TO.get(room, ())
    lower_room = imported.split(".")[1] if imported.count(".") else ""
    return room_of(imported) > room_of(module) or lower_room in UNKNOWN_TO.get(room, ())


def test_no_room_knows_what_is_not_its_own():
    """No import from a lower room to a higher one, and none of a package that the room does without."""
    refused = {(module, name) for module, names in IMPORTS.items() for name in names if is_refused(module, name)}
    assert not refused


def test_targets_are_made_without_torch():
    assert IMPORTS["chat_logits.training.targets"] & {"torch", "transformers"} == set()


def test_no_circle_of_imports():
    graph = {module: {name for name in names if name in FILES} for module, names in IMPORTS.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_command_line_is_known_to_the_commands_alone():
    users = {module for module, names in IMPORTS.items() for name in names if name.startswith("chat_logits.cli")}
    assert {user for user in users if not user.startswith("chat_logits.cli")} == set(COMMANDS)


def texts_of(module: str) -> set[str]:
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_no_flag_is_named_but_by_the_command_line():
    """Messages elsewhere name an option in backquotes, which ``cli`` prints as it is typed."""
    inside = {module for module in FILES if not module.startswith("chat_logits.cli.") and module not in COMMANDS}
    flags = {module: {text for text in texts_of(module) if FLAG.search(text)} for module in inside}
    assert {module: texts for module, texts in flags.items() if texts} == FLAGS_ELSEWHERE
