"""The options of a run. The command line and config files have the same options under the same names."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from chat_logits.data.config import SourceConfig
from chat_logits.errors import UsageError
from chat_logits.model.config import ModelConfig
from chat_logits.options import COMPUTED, EXTRACTED, READ, SPREAD, WRITTEN, option

DEFAULT_OUTPUTS = Path("outputs")
USUAL_ROWS, MANY_ROWS = 256, 1024  # source rows a shard, by default


def _check_repo(output_repo: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", output_repo):
        raise UsageError(f"`output_repo` {output_repo}: expected USER/NAME")


def _check_bad_rows(limit: float) -> None:
    if 1 < limit < math.inf and limit % 1:
        raise UsageError(f"`max_bad_rows` {limit}: expected a share below 1, or a whole number")


def _check_part(part: str) -> None:
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", part)
    if not match or int(match[1]) > int(match[2]):
        raise UsageError(f"`part` {part}: expected I/N, part I of N, such as 1/8 to 8/8")


def _check_address(address: str) -> None:
    if address.startswith("ray://"):
        raise UsageError(f"`ray_address` {address}: expected HOST:PORT as `ray start` prints it, without ray://")
    match = re.fullmatch(r"(?:[^\s/:]+|\[[0-9a-fA-F:]+\]):([1-9]\d{0,4})", address)
    if address != "auto" and not (match and int(match[1]) < 2**16):
        raise UsageError(f"`ray_address` {address or repr(address)}: expected HOST:PORT or auto")


@dataclass(frozen=True, repr=False)
class ExtractConfig(SourceConfig, ModelConfig):
    """A run: model, source, what is stored of each distribution, and where.

        ExtractConfig(model_id="Qwen/Qwen2.5-0.5B-Instruct", dataset_id="chats.jsonl", output_dir="outputs/chats")

    Raises UsageError, naming the option, its value and what was expected.
    """

    max_bad_rows: float = option(
        0.01,
        help="end the run at more bad source rows: a share (below 1) of the first thousand, then of all, or a number",
        group=READ,
        metavar="SHARE_OR_N",
        least=0,
        check_value=_check_bad_rows,
    )
    top_k: int = option(
        64,
        help="most probable tokens considered",
        group=EXTRACTED,
        metavar="K",
        least=1,
        example="128",
    )
    top_p: float = option(
        0.98,
        help="of those, keep up to this total probability, in (0, 1]",
        group=EXTRACTED,
        metavar="P",
        above=0,
        most=1,
    )
    num_sampled: int = option(
        16,
        help="tokens sampled from outside the nucleus, a position; rows with 0 are refused for training unless "
        "allow_biased is given, and for measuring a student",
        group=EXTRACTED,
        metavar="S",
        least=0,
        example="32",
    )
    seed: int = option(0, help="seed of the sampling", group=EXTRACTED, metavar="N", least=0, most=2**63 - 1)
    output_repo: str | None = option(
        None,
        help="Hub dataset to push to",
        unset="none; the folder only",
        group=WRITTEN,
        metavar="USER/NAME",
        check_value=_check_repo,
        example="user/my-logits-dataset",
    )
    output_revision: str | None = option(
        None, help="its branch, made if it is missing", unset="main", group=WRITTEN, metavar="BRANCH"
    )
    private: bool = option(False, help="make the Hub dataset private if it is new", unset="public", group=WRITTEN)
    push_every: float = option(300.0, help="time between commits to the Hub", group=WRITTEN, metavar="SECONDS", least=0)
    output_dir: str | None = option(
        None,
        help="local folder",
        unset="outputs/NAME of the Hub dataset",
        group=WRITTEN,
        metavar="FOLDER",
        example="outputs/chats",
    )
    overwrite: bool = option(
        False,
        help="replace the run that is in folder and Hub dataset; given again in the same folder, it resumes that",
        unset="resume the run that is there, if it is the same",
        group=WRITTEN,
        example="",
    )
    rows_per_shard: int | None = option(
        None,
        help="source rows a file; a stopped run resumes with the first one missing",
        unset=f"{USUAL_ROWS}; with an accelerator {MANY_ROWS:,}, if answers are short and all workers have enough",
        group=WRITTEN,
        metavar="N",
        least=1,
        most=2**24,  # what readers take
    )
    check_shards: bool = option(
        False,
        help="when resuming, check all finished shards against their checksums",
        unset="those that changed since they were written",
        group=WRITTEN,
    )
    num_cpu_workers: int | None = option(
        None,
        help="for each model, processes that render and tokenize, and as many that encode and write; 1: only threads",
        unset="1 on a CPU; with an accelerator a quarter of the cores that it may use, 4 at most",
        group=COMPUTED,
        metavar="N",
        least=1,
    )
    num_workers: int = option(
        1,
        help="workers on Ray, each with its own model on one or more accelerators",
        unset="1, without Ray",
        group=SPREAD,
        metavar="N",
        least=1,
    )
    ray_address: str | None = option(
        None,
        help="the Ray cluster that they run on, or auto for the one this machine is part of; without a local folder, "
        "their shards go straight to the Hub dataset",
        unset="this machine only",
        group=SPREAD,
        metavar="HOST:PORT",
        check_value=_check_address,
    )
    gpus_per_worker: int = option(
        1,
        help="GPUs that one worker's model is spread over, with a device map",
        group=SPREAD,
        metavar="N",
        least=1,
    )

    part: str | None = option(
        None,
        help="compute only part I of N, in a folder within the run's own; when all are finished, the same command "
        "without this joins them",
        unset="the whole run",
        group=SPREAD,
        metavar="I/N",
        check_value=_check_part,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part and (self.uses_ray or self.overwrite):
            other = "overwrite" if self.overwrite else "num_workers" if self.num_workers > 1 else "ray_address"
            raise UsageError(f"`part` {self.part}: it does not go with `{other}`")
        if self.uses_ray and self.device not in (None, "cpu"):
            raise UsageError(f"`device` {self.device}: each worker gets its own accelerator; leave it out, or give cpu")
        if self.gpus_per_worker > 1 and not (self.uses_ray and self.device_map):
            raise UsageError(f"`gpus_per_worker` {self.gpus_per_worker}: it goes with `num_workers` and `device_map`")

    @property
    def uses_ray(self) -> bool:
        """Whether workers on Ray compute the shards."""
        return self.num_workers > 1 or self.ray_address is not None

    @property
    def devices_per_worker(self) -> int:
        """Accelerators that each worker on Ray takes, all on one machine."""
        return max(self.tensor_parallel, self.gpus_per_worker)  # one of which is 1

    @property
    def uploads_without_folder(self) -> bool:
        """Whether workers upload each shard to the Hub themselves, so that they need no shared folder."""
        return bool(self.ray_address and not self.output_dir)

    @property
    def folder(self) -> Path:
        """The local folder of the run. Raises UsageError if neither a folder nor a Hub dataset is given."""
        if self.output_dir:
            return Path(self.output_dir)
        if not self.output_repo:
            raise UsageError("nowhere to write: give `output_repo` USER/NAME, `output_dir` FOLDER, or both")
        return DEFAULT_OUTPUTS / self.output_repo.split("/")[-1]
