"""The parts of a training run, made from its configuration."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.optim.swa_utils import AveragedModel

from align.draws import NoDraws
from align.model import DualEncoder, DualEncoderConfig, Tower
from align.objective import ContrastiveObjective
from align.optim import build_optimizer, parameter_groups
from align.parameters import Learning, freeze, how_it_learns
from align.tokenizer import Tokenizer
from align.tokenizer_source import tokenizer_of
from pipelines.captions import CaptionWriter, positive_labels, train_tokenizer
from pipelines.config import ConfigError
from pipelines.importing import no_bars
from pipelines.learning import learning_rules, locked_at_random
from pipelines.losses import make_loss
from pipelines.parallel import Spread, running_average, share_statistics, spread
from pipelines.progress import Ledger
from pipelines.schemas import ModelConfig, PretrainConfig
from pipelines.schemas.training import StageConfig
from pipelines.schemas.values import steps_of
from pipelines.starting import Start
from pipelines.telemetry import FlopMeter
from pipelines.together import Share
from shards.augment import Augment
from shards.crop import FITS, BoxFinder, RandomCrop
from shards.damage import DamageTally, merged
from shards.decode import resize
from shards.loader import Batch, ShardLoader, Source, iterate
from shards.manifest import Manifest


@dataclass
class Training:
    """Everything a step touches."""

    config: PretrainConfig
    accelerator: Accelerator
    loader: ShardLoader
    captions: CaptionWriter
    augment: Augment | None
    objective: ContrastiveObjective
    learning: dict[str, Learning]  # of each parameter
    spread: Spread  # the objective over processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless the precision is fp16
    average: AveragedModel | None
    fingerprint: str
    notes: list[str]  # on what is locked at random weights
    start: Start | None = None  # the bundle that the run goes on from
    step: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0  # latest steps without a finite gradient that no scale of the loss mends
    bad_samples: int = 0  # met by all processes since the run began
    cut_captions: int = 0  # likewise, longer than the context
    earlier_report: dict[str, Any] | None = None  # what the run met before it was resumed

    ledger: Ledger = field(default_factory=Ledger)  # of what is not yet in a line
    meter: FlopMeter = field(default_factory=FlopMeter)

    @property
    def steps(self) -> int:
        """Length of the run."""
        return self.count(self.config.samples)

    @property
    def parameters(self) -> int:
        """Numbers that the model and its loss consist of, learning or not."""
        return sum(one.numel() for one in self.objective.parameters())

    @property
    def pieces(self) -> int:
        """How many pieces this process works its share of a batch through in."""
        local = self.config.batch_size // self.accelerator.num_processes
        return local // (self.config.micro_batch_size or local)

    def count(self, span: int | str) -> int:
        """How many steps a length makes."""
        return steps_of(span, batch_size=self.config.batch_size, epoch=self.loader.num_samples)

    def share(self, part: float | int | str) -> int:
        """How many steps a share of the run makes, or a length."""
        return round(part * self.steps) if isinstance(part, float) else self.count(part)

    @property
    def scale_can_fall(self) -> bool:
        """Whether gradients that are not finite may come from the scale of the loss, as in fp16."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    @property
    def chosen_model(self) -> DualEncoder:
        """The averaged weights where there are any, else the trained ones.

        All processes must ask for it: where each has a share of the weights, they are gathered.
        """
        return self.spread.whole(self.chosen.model)

    @property
    def chosen(self) -> ContrastiveObjective:
        """Likewise, with the loss; maybe in shares."""
        return self.objective if self.average is None else cast(Any, self.average.module)

    @property
    def wrapped(self) -> Any:
        """The objective as it is called."""
        return self.spread.wrapped

    @property
    def image_size(self) -> int:
        """Side of the pictures at this step, by the stage of the run."""
        stage = self.stage
        return (stage and stage.image_size) or self.config.model.image_size

    @property
    def context_length(self) -> int:
        """Longest text at this step, likewise."""
        stage = self.stage
        return (stage and stage.context_length) or self.config.model.context_length

    @property
    def stage(self) -> StageConfig | None:
        """The stage that the step ahead belongs to; None = what remains of the run."""
        share = self.step / self.steps
        return next((stage for stage in self.config.stages if share < stage.until), None)

    @property
    def earlier_bad(self) -> int:
        """Bad samples that the run met before it was resumed."""
        return self.earlier_report["bad"] if self.earlier_report else 0

    def data_report(self) -> dict[str, Any]:
        """What all processes met in the data since the run began; all of them must call it."""
        ranks = gather_object([self.loader.report()])
        report = merged([*([self.earlier_report] if self.earlier_report else []), *ranks])
        return {**report, "cut_captions": self.cut_captions}


def build(config: PretrainConfig, accelerator: Accelerator, start: Start | None = None) -> Training:
    """Make every part of a run from its configuration; nothing is written yet."""
    refuse_uneven_pieces(config, accelerator)
    augment = make_augment(config)
    with accelerator.main_process_first():  # a scan is made once, and kept for the others
        sources = open_sources(config)
    loader = make_loader(config, sources, accelerator)
    manifest = loader.manifest
    Share.of(accelerator).refuse_different_data({str(manifest.place): manifest.fingerprint})
    captions = CaptionWriter(config.captions, seed=config.seed)
    # The first sample tells whether the field is there, before anything is written.
    head = iterate(
        manifest,
        batch_size=1,
        image_size=8,
        captions=config.caption_fields,
        tally=DamageTally(total=len(manifest), max_fraction=config.max_bad_fraction),
    )
    if (first := next(head, None)) is None:
        raise ConfigError(f"{manifest.place}: none of its {len(manifest)} samples can be read")
    positive_labels(first, config.loss.positives)
    tokenizer = start.tokenizer if start else make_tokenizer(config, manifest, captions)
    return assemble(
        config,
        accelerator,
        loader=loader,
        augment=augment,
        captions=captions,
        tokenizer=tokenizer,
        start=start,
    )


def assemble(
    config: PretrainConfig,
    accelerator: Accelerator,
    *,
    loader: ShardLoader,
    augment: Augment | None,
    captions: CaptionWriter,
    tokenizer: Tokenizer,
    start: Start | None = None,
) -> Training:
    """The model and its optimiser, together with what feeds them."""
    torch.manual_seed(config.seed)
    loss = make_loss(config.loss, samples=loader.num_samples)
    with NoDraws() if start else nullcontext():
        objective = ContrastiveObjective(make_model(config.model, tokenizer), loss)
    if start:
        start.put_into(objective)
    check_stages(config, objective.model)
    objective.model.text.chunks = config.text_chunks
    save_memory(config, objective.model)
    objective = share_statistics(objective, accelerator)
    objective.to(accelerator.device).to(memory_format=torch.channels_last)  # pyright: ignore
    rules, decay = learning_rules(config, objective.model), config.optimizer.weight_decay
    learning = how_it_learns(objective, rules, weight_decay=decay)
    notes = [] if start else locked_at_random(config, objective.model, learning)
    freeze(objective, learning)
    average = running_average(objective, config, accelerator)
    over_processes = spread(objective, average, config, accelerator)
    optimizer = build_optimizer(
        config.optimizer.name,
        parameter_groups(objective, rules=rules, weight_decay=decay),
        learning_rate=config.optimizer.learning_rate,
        **config.optimizer.options,
    )
    return Training(
        config=config,
        accelerator=accelerator,
        loader=loader,
        captions=captions,
        augment=augment,
        objective=objective,
        learning=learning,
        spread=over_processes,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=config.precision == "fp16"),
        average=average,
        fingerprint=loader.manifest.fingerprint,
        notes=notes,
        start=start,
    )


def refuse_uneven_pieces(config: PretrainConfig, accelerator: Accelerator) -> None:
    """Every process works through whole pieces.

    Raises:
        ConfigError: it cannot.
    """
    processes, micro = accelerator.num_processes, config.micro_batch_size
    if micro is not None and config.batch_size % (micro * processes):
        raise ConfigError(
            f"micro_batch_size: {micro} on {processes} processes does not divide batch_size "
            f"({config.batch_size})"
        )


def make_tokenizer(
    config: PretrainConfig, manifest: Manifest, captions: CaptionWriter
) -> Tokenizer:
    """The tokenizer named, else that of the pretrained weights, else one trained on captions."""
    wanted, text = config.tokenizer, config.model.text
    name, clean = wanted.name, wanted.clean
    if name is None and (own := tokenizer_of(text.name, text.options)):
        name, clean = own[0], clean or own[1]
    if name is not None:
        return Tokenizer.load(name, context_length=config.model.context_length, clean=clean)
    return train_tokenizer(
        manifest,
        captions,
        fields=config.caption_fields,
        vocabulary_size=wanted.vocabulary_size,
        context_length=config.model.context_length,
        clean=clean or "none",
    )


def check_stages(config: PretrainConfig, model: DualEncoder) -> None:
    """See whether the towers take what each stage gives them.

    Raises:
        ConfigError: texts are cut to nothing, or not at all.
        ValueError: the image tower does not take pictures of that size.
    """
    for size in {*(stage.image_size for stage in config.stages), config.model.image_size} - {None}:
        model.image.check_size(size)
    for number, stage in enumerate(config.stages):
        least, most = model.tokenizer.added + 1, config.model.context_length
        if stage.context_length is not None and not least <= stage.context_length <= most:
            raise ConfigError(
                f"stages.{number}.context_length: {stage.context_length} is not from {least} (the "
                f"tokenizer adds {least - 1} tokens to every text) to model.context_length ({most})"
            )


def save_memory(config: PretrainConfig, model: DualEncoder) -> None:
    """Have the towers keep no activations, where that is asked for.

    Raises:
        ConfigError: a tower cannot.
    """
    if not config.gradient_checkpointing:
        return
    for tower in (model.image, model.text):
        try:
            tower.set_gradient_checkpointing(True)
        except ValueError as error:
            raise ConfigError(f"gradient_checkpointing: {error}") from error


def make_model(config: ModelConfig, tokenizer: Tokenizer) -> DualEncoder:
    """The dual encoder that a configuration describes."""
    description = DualEncoderConfig(
        image=Tower(config.image.name, dict(config.image.options), config.image.projection),
        text=Tower(config.text.name, dict(config.text.options), config.text.projection),
        dim=config.dim,
        image_size=config.image_size,
        context_length=config.context_length,
        fit=config.fit,
    )
    with no_bars():
        return DualEncoder(description, tokenizer)


def open_sources(config: PretrainConfig) -> list[Source]:
    """The data sets of a run, opened, with their weights."""
    if isinstance(config.data, str):
        return [Source(Manifest.open(config.data))]
    return [Source(Manifest.open(source.data), source.weight) for source in config.data]


def make_loader(
    config: PretrainConfig, sources: list[Source], accelerator: Accelerator
) -> ShardLoader:
    """The training stream: this process's share of every global batch."""
    return ShardLoader(
        sources,
        batch_size=config.batch_size,
        image_size=config.augment.decode_size or config.model.image_size,
        seed=config.seed,
        lanes=config.lanes,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        workers=config.workers,
        captions=config.caption_fields,
        crop=make_crop(config),
        max_bad_fraction=config.max_bad_fraction,
        strict=config.strict,
    )


def make_crop(config: PretrainConfig) -> RandomCrop | BoxFinder:
    """What draws the part of a picture that is used, or finds it as the model's fit says.

    Raises:
        ConfigError: a senseless range.
    """
    crop = config.augment.crop
    if not config.augment.enabled or crop is None:
        return FITS[config.model.fit]
    try:
        return RandomCrop(config.seed, scale=crop.scale, ratio=crop.ratio)
    except ValueError as error:
        raise ConfigError(f"augment.{error}") from error


def make_augment(config: PretrainConfig) -> Augment | None:
    """What changes training pictures at random, or None.

    Raises:
        ConfigError: an unknown option.
    """
    if not config.augment.enabled:
        return None
    # YAML tells 6 from 6.0; every number of these is a real one.
    options: dict[str, Any] = {
        name: float(value) if type(value) is int else value
        for name, value in config.augment.options.items()
    }
    try:
        return Augment(seed=config.seed, **options)
    except TypeError as error:
        known = ", ".join(list(signature(Augment).parameters)[1:])
        raise ConfigError(f"augment.options: {error}; known: {known}") from error


def training_pictures(training: Training, batch: Batch) -> torch.Tensor:
    """The pictures of a step: at the size of its stage, changed at random; on the device."""
    size = training.image_size
    images = batch.images.to(training.accelerator.device)
    if training.augment is not None:
        return training.augment(images, batch.ids, batch.epochs, size=size)
    return images if images.shape[-1] == size else resize(images, size)
