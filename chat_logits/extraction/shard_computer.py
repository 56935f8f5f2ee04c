"""A process that holds the model: what the model adds to the run's description, and shards through it.

The plain run has one, and every worker of a run on several accelerators.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from chat_logits.extraction.pipeline import Side, run_shards
from chat_logits.extraction.run_description import OpenedRun, describe_with_model
from chat_logits.model import loading, teacher
from chat_logits.model.memory import choose_budget
from chat_logits.scratch import remove_scratch
from chat_logits.storage.manifest import Manifest, ShardEntry
from chat_logits.storage.shard import write_shard

logger = logging.getLogger(__name__)


@dataclass
class ShardComputer:
    """The model of an opened run on one device, whose shards go to ``folder``; ``check_place`` is ``write_shard``'s."""

    opened: OpenedRun
    device: torch.device
    folder: Path
    check_place: Callable[[], None] = field(default=lambda: None)
    model: object = None
    cache_agrees: bool = False

    def describe(self) -> Manifest:
        """The manifest of a new run. Loads the model."""
        self.load_model()
        return describe_with_model(self.opened, self.model, **self._budget())

    def compute(
        self,
        shards: Iterator[int],
        manifest: Manifest,
        finished: Callable[[ShardEntry], None],
        progress: Callable[[], tqdm],
    ) -> None:
        """Compute these shards of the run that ``manifest`` describes; the model is loaded if there are any.

        Each is written, and its entry given to ``finished``; ``progress()`` begins the bar, over conversations.
        """

        def finish(shard: int, rows: list[dict], skipped: list[dict]) -> None:
            finished(write_shard(self.folder, manifest, shard, rows, skipped, self.check_place))

        with Side() as side:
            read = side.read_ahead(self.opened.reader, shards, manifest.rows_per_shard)
            first = next(read, None)
            if first is None:
                return
            self.load_model()
            settings = replace(manifest, **self._budget(manifest))
            with progress() as bar:
                run_shards(self.model, settings, itertools.chain([first], read), side, finish, bar)

    def close(self) -> None:
        """Leave nothing behind of a spread model."""
        remove_scratch()

    def load_model(self) -> None:
        """Load and check the model, if that is not done yet."""
        if self.model is not None:
            return
        config = self.opened.config
        where = "over all devices" if config.device_map else f"on {self.device}"
        logger.info("Loading %s %s …", config.model_id, where)
        self.model = loading.load_model(
            config.model_id,
            self.opened.model_commit,
            config.gguf_file,
            config.dtype,
            self.device,
            config.attn_implementation,
            config.trust_remote_code,
            config.device_map,
            config.max_memory,
        )
        self.cache_agrees = teacher.probe(self.model)
        if not self.cache_agrees and config.prefix_cache:
            logger.info("Shared prefixes are not cached: this model's cache does not give the plain logits")

    def _budget(self, recorded: Manifest | None = None) -> dict:
        """How batches are formed: as the options say, else as recorded, so that a resumed run has the same batches."""
        config = self.opened.config
        budget = choose_budget(self.model, config.batch_tokens, config.logit_memory)
        chosen = {"batch_tokens": budget.tokens, "batch_logit_rows": budget.logit_rows}
        options = {"batch_tokens": config.batch_tokens, "batch_logit_rows": config.logit_memory}
        kept = {name: getattr(recorded, name, None) for name, option in options.items() if option is None}
        cached = config.prefix_cache and self.cache_agrees and getattr(recorded, "prefix_cache", None) is not False
        return {name: kept.get(name) or chosen[name] for name in chosen} | {"prefix_cache": cached}
