"""The plan of a run before a machine is rented: what the model needs, what the dataset has, how long it should take.

No model is loaded, nothing is written, and no file with weights is opened. Every figure says what it is based on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from chat_logits.data.reader import Reader, open_reader
from chat_logits.data.token_count import Estimate, TokenCount, count_tokens
from chat_logits.errors import UsageError
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.run_description import tokenizer_for, with_commits
from chat_logits.model import plan as arithmetic
from chat_logits.model.adapters import find_base
from chat_logits.model.bits import bits_of
from chat_logits.model.cards import Card
from chat_logits.model.config import ModelConfig
from chat_logits.model.limits import input_limits, load_config
from chat_logits.model.plan import CARDS_A_WORKER, Batching, Load, Work
from chat_logits.model.quantization import find_quantization, nothing_quantized
from chat_logits.model.shape import INDEX, Shape, shape_of
from chat_logits.stages import stage
from chat_logits.storage.disk import MEASURED, bytes_a_token
from chat_logits.words import count_text

COUNT, BYTES, FLOPS, SECONDS = "count", "bytes", "FLOPs", "seconds"


@dataclass(frozen=True)
class Figure:
    """One line of a plan: its name, its value in a unit, its source, and its standard error if it is an estimate.

    The value is None if it is not known; ``source`` then says why.
    """

    name: str
    value: float | None
    unit: str
    source: str
    error: float | None = None


@dataclass(frozen=True)
class Plan:
    """A run's figures under headings; later ones are derived from earlier ones."""

    model_id: str
    dataset_id: str | None
    sections: dict[str, list[Figure]]

    def __getitem__(self, name: str) -> Figure:
        """The figure of this name."""
        return next(figure for figures in self.sections.values() for figure in figures if figure.name == name)


def plan(config: ModelConfig, plan_for: str | None = None, sampled: int | None = None) -> Plan:
    """The plan of a run, or of only the model if ``config`` has no dataset.

    ``plan_for`` names a card, as ``model.plan.choose_card`` takes it; at most ``sampled`` source rows are tokenized.
    Raises UsageError and ToolkitError as a run does for missing sources, and UsageError for GGUF files, which cannot be
    read without their weights.
    """
    if config.gguf_file:
        raise UsageError(
            f"`gguf_file` {config.gguf_file}: a plan reads no weights, and a GGUF file has its configuration among "
            "them. Plan the model that it was made from."
        )
    card = arithmetic.choose_card(plan_for, config.device)
    config = with_commits(config, ("model", "dataset") if isinstance(config, ExtractConfig) else ("model",))
    with stage("Reading the model's configuration"):
        shape, limits = _read_shape(config, on_cpu=card.device_type == "cpu")
    if not isinstance(config, ExtractConfig):
        load_figures, _ = _card_figures(shape, card, config, None)
        return Plan(
            config.model_id, None, {"The model": _model_figures(shape, config), f"On {card.name}": load_figures}
        )
    reader = open_reader(config, tokenizer_for(config, limits), limits)
    with stage("Counting tokens on a sample of the source rows"):
        counted = count_tokens(reader) if sampled is None else count_tokens(reader, sampled)
    load_figures, load = _card_figures(shape, card, config, counted)
    sections = {
        "The model": _model_figures(shape, config),
        f"On {card.name}": load_figures,
        "The dataset": _dataset_figures(reader, counted),
        "The run": _run_figures(config, shape, load, counted),
    }
    return Plan(config.model_id, config.dataset_id, sections)


def _read_shape(config: ModelConfig, on_cpu: bool):
    """The shape of the model (for an adapter, of its base), and what the model can read."""
    base = find_base(config.model_id, config.model_revision)
    model_id, revision = (base.model_id, base.revision) if base else (config.model_id, config.model_revision)
    if Path(model_id).exists():
        revision = None
    found = load_config(model_id, revision, None, config.trust_remote_code)
    limits = input_limits(found)
    code = config.trust_remote_code
    quantization = find_quantization(
        model_id, revision, trust_remote_code=code, option=config.quantization, is_adapter=base is not None
    )
    shape = shape_of(found, config.dtype, model_id, revision, code, on_cpu, quantization)
    if shape.on_loading and not shape.in_fewer_bits:
        raise nothing_quantized(model_id, config.quantization)
    return shape, limits


# --- the model ---


def _model_figures(shape: Shape, config: ModelConfig) -> list[Figure]:
    figures = [Figure("parameters", shape.parameters, COUNT, f"{shape.name} built from config.json, without values")]
    if shape.is_mixture:
        figures.append(Figure("active a token", shape.active, COUNT, _experts_text(shape)))
    figures.append(Figure(f"weights, {shape.dtype}", shape.weight_bytes(), BYTES, _bytes_text(shape, config)))
    if shape.stored and (shape.quantization is None or shape.on_loading):
        figures.append(Figure("checkpoint", shape.stored, BYTES, f"total_size in {INDEX}"))
    return figures


def _bytes_text(shape: Shape, config: ModelConfig) -> str:
    if shape.quantization is not None and not shape.on_loading and shape.stored:
        return f"total_size in {INDEX}: quantised, and loaded as they are stored"
    if shape.quantization is not None:
        by = f"`quantization` {config.quantization}" if shape.on_loading else "quantization_config in config.json"
        each = f"{bits_of(shape.quantization) or 0:.3g} bits a quantised weight, by {by}"
        share = sum(shape.in_fewer_bits.values()) / shape.parameters
        return f"{each}; {shape.dtype} for the others, {1 - share:.0%} of all"
    by_itself = "float32 on every CPU" if shape.on_cpu else "dtype in config.json"
    return f"{shape.model.dtype.itemsize} bytes each: {by_itself if config.dtype == 'auto' else '`dtype`'}"


def _experts_text(shape: Shape) -> str:
    if shape.has_unknown_experts:
        return "it has experts, whose parameters are in a form that is not known here"
    most = max(shape.experts.values())
    if shape.active is None:
        return f"config.json does not say how many of {most} experts a token goes to"
    return f"{shape.experts_a_token} of {most} experts a layer, and all else"


# --- what a card holds ---


def _card_figures(
    shape: Shape, card: Card, config: ModelConfig, counted: TokenCount | None
) -> tuple[list[Figure], Load | None]:
    """The figures of one card, and its load with the fewest cards that are enough; None if no number of cards is."""
    longest = counted.longest if counted else Batching.longest
    batching = Batching(config.batch_tokens, config.logit_memory, config.prefix_cache, longest)
    if config.tensor_parallel > 1:
        return _asked_figures(shape, card, config.tensor_parallel, batching, counted is not None)
    load, why = arithmetic.smallest_load(shape, card, config.device_map is None, batching)
    instead = None
    if load is None and config.device_map is None:
        instead, _ = arithmetic.smallest_load(shape, card, False, batching)
    figures = [Figure("memory of a card", card.memory, BYTES, card.source), _group_figure(config, load, why, instead)]
    shown = load or instead
    return figures + (_held_figures(shape, shown, longest, counted is not None) if shown else []), shown


def _asked_figures(
    shape: Shape, card: Card, cards: int, batching: Batching, is_counted: bool
) -> tuple[list[Figure], Load]:
    """As ``_card_figures``, on the cards that `tensor_parallel` asks for. Raises UsageError if they cannot share."""
    if obstacle := shape.split(cards).obstacle:
        raise UsageError(f"`tensor_parallel` {cards}: {obstacle}")
    load = arithmetic.load_on(shape, card, cards, True, batching)
    source = "`tensor_parallel`" if load.fits else f"`tensor_parallel`, which is too few: {arithmetic.too_little(load)}"
    asked = Figure("cards a worker", cards, COUNT, source)
    held = _held_figures(shape, load, batching.longest, is_counted)
    return [Figure("memory of a card", card.memory, BYTES, card.source), asked, *held], load


def _group_figure(config: ModelConfig, load: Load | None, why: str, instead: Load | None) -> Figure:
    if load is None:
        most = f"{CARDS_A_WORKER[-1]} cards do not hold it"
        way_out = f"`device_map` auto, one of them at work at a time. Sharing will not do: {why}" if instead else most
        return Figure("cards a worker", instead.cards if instead else None, COUNT, way_out)
    if load.cards == 1:
        return Figure("cards a worker", 1, COUNT, "one holds it, with room for batches")
    way = f"`tensor_parallel` {load.cards}" if load.is_shared else f"`device_map` {config.device_map}"
    return Figure("cards a worker", load.cards, COUNT, f"{way}; fewer will not do: {why}")


def _held_figures(shape: Shape, load: Load, longest: int, is_counted: bool) -> list[Figure]:
    divided = "all of them"
    if load.cards > 1:
        divided = "the process with most, by transformers' plan" if load.is_shared else "an even part"
    if shape.split(load.processes).is_attention_whole:
        divided = f"{divided}; attention is whole in each, its heads do not divide"
    tokens, rows = f"{load.budget.tokens:,} tokens a batch", f"{min(load.budget.tokens, load.budget.logit_rows):,} rows"
    at_most = f"conversations of up to {longest:,}{'' if is_counted else ', which is taken'}"
    parts = load.parts
    return [
        Figure("weights a card", load.weights, BYTES, divided),
        Figure("logits, at most", parts.logits, BYTES, f"{rows} of {len(shape.head.weight):,} float32, and a copy"),
        Figure(
            "prefix cache, at most", parts.prefix_cache, BYTES, f"keys and values, up to eight for each of {tokens}"
        ),
        Figure("activations, at most", parts.layer_at_work, BYTES, f"a layer at work on {tokens}, {at_most}"),
        Figure("hidden states kept", parts.kept_hidden_states, BYTES, "those that predict an extracted token"),
        Figure("held at the peak", load.total, BYTES, "the sum of these"),
    ]


# --- the dataset ---


def _dataset_figures(reader: Reader, counted: TokenCount) -> list[Figure]:
    sample = f"a sample of {counted.sampled:,} source rows, as a run renders them"
    if counted.rows == counted.sampled:
        sample = "all source rows, as a run renders them"
    elif counted.tokens.error is None:
        sample = f"the first {counted.sampled:,} source rows, which may be unlike the others"
    figures = [
        Figure("source rows", counted.rows, COUNT, _rows_text(reader, counted)),
        Figure("tokens a row", counted.tokens.mean, COUNT, sample, counted.tokens.error),
        Figure("extracted a row", counted.extracted.mean, COUNT, sample, counted.extracted.error),
        _total("tokens", counted.tokens, counted),
        _total("extracted tokens", counted.extracted, counted),
        Figure("longest conversation", counted.longest, COUNT, f"of the {counted.sampled:,}"),
    ]
    if counted.skipped:
        figures.append(Figure("skipped", counted.skipped, COUNT, f"of the {counted.sampled:,}; `preview` shows why"))
    return figures


def _rows_text(reader: Reader, counted: TokenCount) -> str:
    if counted.rows is None:
        return "nothing says how many a stream has; `max_samples` N reads the first N"
    return "the dataset" if counted.rows == reader.source.num_rows else "`max_samples`"


def _total(name: str, estimate: Estimate, counted: TokenCount) -> Figure:
    if counted.rows is None:
        return Figure(name, None, COUNT, "the source rows are not counted")
    total = estimate.times(counted.rows)
    return Figure(name, total.mean, COUNT, f"source rows × {name.removesuffix(' tokens')} a row", total.error)


# --- the run ---


class Totals(NamedTuple):
    """Totals of the whole dataset: tokens read, pairs of tokens where one attends to the other, extracted tokens."""

    tokens: Estimate
    pairs: Estimate
    extracted: Estimate

    @property
    def means(self) -> tuple[float, float, float]:
        return self.tokens.mean, self.pairs.mean, self.extracted.mean


def _run_figures(config: ExtractConfig, shape: Shape, load: Load | None, counted: TokenCount) -> list[Figure]:
    if counted.rows is None:
        return [Figure("output", None, BYTES, "the source rows are not counted")]
    totals = Totals(*(one.times(counted.rows) for one in (counted.tokens, counted.pairs, counted.extracted)))
    output = _output_figure(config, totals.extracted)
    if (work := arithmetic.work_of(shape, *totals.means)) is None:
        return [output, Figure("operations", None, FLOPS, _experts_text(shape))]
    operations = Figure("operations", work.total, FLOPS, _work_text(shape, work))
    return [output, operations, *_time_figures(config, shape, load, work, totals)]


def _output_figure(config: ExtractConfig, extracted: Estimate) -> Figure:
    entries = config.top_k + config.num_sampled
    each = bytes_a_token(entries)
    how = "measured" if entries in MEASURED else "between measured settings"
    source = f"{each:.0f} bytes a token at K = {config.top_k}, S = {config.num_sampled}: {how}, docs/scale.md"
    return Figure(
        "output", extracted.mean * each, BYTES, source, None if extracted.error is None else extracted.error * each
    )


def _work_text(shape: Shape, work: Work) -> str:
    active = (shape.active_in_layers() or 0) / 1e9
    shares = f"attention {work.attention / work.total:.1%}, lm_head {work.head / work.total:.1%}"
    return f"two a token for each of {active:,.4g}·10⁹ parameters at work in the layers; {shares}"


def _time_figures(config: ExtractConfig, shape: Shape, load: Load | None, work: Work, totals: Totals) -> list[Figure]:
    if load is None:
        return [Figure("time", None, SECONDS, "no cards hold the model")]
    own = arithmetic.work_of(shape, *totals.means, load.processes)
    if own is None or (by_card := arithmetic.seconds_of(own, load.card)) is None:
        unknown = f"the peak of {load.card.name} is not known; `plan_for` takes a card's name"
        return [Figure("time", None, SECONDS, unknown)]
    if shape.dtype == "float32":
        return [
            Figure("time", None, SECONDS, "float32; the peaks that are known are of 16 bits, such as `dtype` bfloat16")
        ]
    workers, by_host = config.num_workers, totals.tokens.mean / arithmetic.HOST_RATE
    spent, slower = max((by_card, "cards"), (by_host, "host"))
    longer = f"the longer, by the {slower}; {count_text(workers, 'worker')}; start and uploads aside"
    host = f"{arithmetic.HOST_RATE:,} tokens read a second a worker: {arithmetic.HOST_MEASURED}"
    return [
        Figure("time by the cards", by_card / workers, SECONDS, _rate_text(shape, load, own.total / work.total)),
        Figure("time by the host", by_host / workers, SECONDS, host),
        Figure("time", spent / workers, SECONDS, longer),
        Figure("card hours", spent * load.cards / 3600, COUNT, f"time × {count_text(workers * load.cards, 'card')}"),
    ]


def _rate_text(shape: Shape, load: Load, share: float) -> str:
    peak = f"{arithmetic.UTILISATION:.0%} of {(load.card.peak or 0) / 1e12:,.0f} TFLOP/s, dense bfloat16"
    unlike = "mixture" if shape.is_mixture else "model in fewer bits" if shape.quantization else None
    measured = f"no {unlike} was measured" if unlike else arithmetic.MEASURED
    if load.cards == 1:
        return f"{peak}; {measured}"
    if load.is_shared:
        return f"{peak}, each card doing {share:.3g} of the work; what they send each other is not counted; {measured}"
    return f"{peak}, one card at work at a time; {measured}"
