"""The package as a wheel, in an environment of its own and from another folder; and installed from the clone."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import runs
from conftest import REPO
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import extract_logits
from explore_logits import execute_analysis

ROWS = [{"question": f"What is {i}?", "answer": f"It is the number {i}, and no other."} for i in range(6)]
COMMANDS = ("extract-logits", "explore-logits", "export-targets", "train-student")
FILES = ("extract_logits", "explore_logits", "export_targets", "train_student", "logit_codec")
MODULES = (*FILES, "chat_logits")


def pip(*arguments) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", REPO, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    (path,) = folder.glob("*.whl")
    return path


def new_environment(folder: Path) -> Path:
    """A virtual environment without the package that sees the dependencies which are installed here; its bin/."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "dependencies.pth").write_text("\n".join(paths) + "\n")  # their own .pth files are not read: no clone
    return folder / "bin"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """bin/ of an environment with the wheel."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    bin_folder = new_environment(folder)
    pip("--python", bin_folder / "python", "install", "--no-deps", "--no-index", wheel)
    return bin_folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A folder that is neither the clone nor the environment, with a source dataset."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return folder


def call(program: Path, *arguments, cwd: Path, found: Path | None = None) -> subprocess.CompletedProcess:
    """Run a program; ``found`` is a folder whose commands are found by their names."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["PATH"] = os.pathsep.join([*([str(found)] if found else []), env["PATH"]])
    return subprocess.run([program, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def extracted(installed, elsewhere, small_model) -> Path:
    """What the installed command wrote."""
    options = ("--model_id", small_model, "--dataset_id", "chats.jsonl", "--output_dir", "out", "--device", "cpu")
    done = call(installed / "extract-logits", *options, cwd=elsewhere, found=installed)
    assert done.returncode == 0, done.stderr
    looks, repeats = done.stderr.split("To look at it:\n")[1].split("To repeat:\n")
    assert [line.strip() for line in looks.splitlines()] == ["explore-logits out", "explore-logits out --browse"]
    assert repeats.strip().startswith("extract-logits --model_id ")
    again = call(installed / "extract-logits", *options, cwd=elsewhere)  # where no name finds it
    folder = str(installed)
    lines = [line.strip() for line in again.stderr.split("To look at it:\n")[1].splitlines()]
    assert lines[0] == f"{folder}/explore-logits out" and lines[3].startswith(f"{folder}/extract-logits --model_id ")
    return elsewhere / "out"


def test_the_wheel_has_the_package_the_modules_the_templates_and_the_pages(wheel):
    expected = {
        path.relative_to(REPO).as_posix()
        for path in (REPO / "chat_logits").rglob("*")
        if "__pycache__" not in path.parts and path.is_file()
    }
    expected |= {f"{name}.py" for name in FILES}
    expected |= {f"chat_logits/templates/{path.name}" for path in (REPO / "templates").iterdir()}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert sum(name.startswith("chat_logits/templates/") for name in names) >= 35
    assert sum(name.startswith("chat_logits/display/pages/") for name in names) >= 5


def test_the_installed_command_writes_what_the_clones_does(extracted, elsewhere, small_model, tmp_path):
    options = ["--model_id", small_model, "--dataset_id", elsewhere / "chats.jsonl", "--output_dir", tmp_path / "out"]
    assert extract_logits.main([*map(str, options), "--device", "cpu"]) == 0
    ours, theirs = runs.files_in(tmp_path / "out"), runs.files_in(extracted)
    assert ours.keys() == theirs.keys()
    (shard,) = (name for name in ours if name.endswith(".parquet"))
    assert ours[shard] == theirs[shard]
    extraction = json.loads(theirs["extraction.json"])
    assert extraction["mask_source"] == "shipped template smollm2.jinja"


def test_the_installed_explorer_shows_it(installed, extracted, elsewhere):
    options = ("--logit_dataset_id", "out", "--sample_index", "1", "--html", "page.html")
    done = call(installed / "explore-logits", *options, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert '"␣number"' in done.stdout and "Wrote page.html" in done.stderr
    page = (elsewhere / "page.html").read_text(encoding="utf-8")
    assert page == execute_analysis(str(extracted), 1, quiet=True).to_html().replace(str(extracted), "out")


def test_the_functions_are_imported_from_the_environment(installed, extracted, elsewhere):
    code = (
        f"import json, {', '.join(MODULES)}\n"
        "from explore_logits import execute_analysis\n"
        "analysis = execute_analysis('out', sample_index=2, quiet=True)\n"
        "log_probs = [token.log_prob for token in analysis if token.is_extracted]\n"
        f"print(json.dumps([[module.__file__ for module in ({', '.join(MODULES)})], log_probs]))\n"
    )
    done = call(installed / "python", "-c", code, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    files, log_probs = json.loads(done.stdout)
    assert all(Path(file).is_relative_to(installed.parent) for file in files)
    expected = [token.log_prob for token in execute_analysis(str(extracted), 2, quiet=True) if token.is_extracted]
    assert log_probs == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_exit_status_are_the_commands(name, installed, elsewhere):
    done = call(installed / name, "--help", cwd=elsewhere)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {name} ")
    done = call(installed / name, "--no_such_option", cwd=elsewhere)
    assert done.returncode == 2 and done.stderr.startswith("error: --no_such_option: ")


def test_a_missing_dataset_is_exit_status_1_or_2_in_two_lines(installed, elsewhere):
    done = call(installed / "explore-logits", "--logit_dataset_id", "nowhere", cwd=elsewhere)
    assert done.returncode in (1, 2) and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) <= 2


def test_an_editable_install_is_the_clone(tmp_path):
    bin_folder = new_environment(tmp_path / "venv")
    target = ("--python", bin_folder / "python")
    pip(*target, "install", "--no-deps", "--no-build-isolation", "--no-index", "--editable", REPO)
    code = f"import {', '.join(MODULES)}\nfrom chat_logits.data.templates import SHIPPED\nprint(SHIPPED)\n"
    code += f"for module in ({', '.join(MODULES)}): print(module.__file__)\n"
    done = call(bin_folder / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shipped, *files = map(Path, done.stdout.split())
    assert shipped == REPO / "templates"
    assert all(file.is_relative_to(REPO) for file in files)
    assert not list((tmp_path / "venv").rglob("*.jinja"))
    assert call(bin_folder / "extract-logits", "--help", cwd=tmp_path).returncode == 0


# --- what the package asks for ---


def requirements(wheel: Path) -> list[Requirement]:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = importlib.metadata.PathDistribution(zipfile.Path(archive, name.rpartition("/")[0] + "/")).metadata
    assert metadata["Name"] == "chat-logits" and metadata["Requires-Python"] == ">=3.11"
    return [Requirement(text) for text in metadata.get_all("Requires-Dist")]


def test_the_ranges_hold_what_ci_installs(wheel):
    places = [*sys.path, str(REPO / ".venv" / "torchao")]  # which lies apart, see test_quantization.py
    for requirement in requirements(wheel):
        found = next(iter(importlib.metadata.distributions(name=requirement.name, path=places)))
        assert requirement.specifier.contains(found.version, prereleases=True)


def test_the_exact_set_names_what_the_package_asks_for(wheel):
    pinned = re.findall(r"^([\w-]+)==", (REPO / "requirements.txt").read_text(), re.M)
    asked = {canonicalize_name(requirement.name) for requirement in requirements(wheel) if not requirement.marker}
    assert {canonicalize_name(name) for name in pinned} == asked


def test_everything_imported_is_asked_for(wheel):
    imported = set()
    for path in [*(REPO / "chat_logits").rglob("*.py"), *(REPO / f"{name}.py" for name in FILES)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    asked = {requirement.name.replace("-", "_") for requirement in requirements(wheel)} - {"pyyaml"} | {"yaml"}
    asked |= {"pandas", "fsspec", "triton"}  # which datasets, and torch for CUDA, ask for
    assert imported - set(sys.stdlib_module_names) - set(MODULES) <= asked
