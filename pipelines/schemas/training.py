"""What `pretrain` can be told."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from align.encoders import IMAGE_LIBRARIES, TEXT_LIBRARIES
from pipelines.config import Config
from pipelines.schemas.evaluation import TaskConfig
from pipelines.schemas.optimizer import LossConfig, OptimizerConfig
from pipelines.schemas.presets import laid_under, preset, presets
from pipelines.schemas.values import (
    CAPTION_FIELDS,
    PLACE,
    WHERE,
    BadFraction,
    Cadence,
    CaptionField,
    Data,
    Length,
    NonNegativeInt,
    Place,
    Seed,
    Strict,
    Where,
)


def _tower_name(name: str, libraries: Iterable[str]) -> str:
    library, separator, rest = name.partition(":")
    if not separator or not rest or library not in libraries:
        known = ", ".join(f"{library}:NAME" for library in libraries)
        raise ValueError(f"unknown tower {name!r}; known: {known}")
    return name


class TowerConfig(Config):
    """What both towers can be told."""

    name: str
    options: dict[str, Any]
    projection: Literal["linear", "affine", "mlp", "none"] = Field(
        default="linear",
        description="Into the space: a matrix, with a bias, one hidden layer, none.",
    )
    trainable: NonNegativeInt | None = Field(
        default=None,
        description="Groups of layers that learn, from the end; 0 = the tower is locked; null =\n"
        "all. The projection behind it learns in any case.",
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Each group of layers learns at this share of the rate of the next, the last\n"
        "at all of it.",
    )


class ImageTowerConfig(TowerConfig):
    """The image tower."""

    name: str = Field(
        default="timm:resnet18",
        description="timm:NAME, hf:NAME (architecture, hub id or folder), open_clip:NAME, or\n"
        "local:FOLDER (a bundle, or what one of those libraries wrote).",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Passed to the library; also pretrained, mean, std; for timm and hf pooling\n"
        "(native, mean, max, cls, attention). A share of the patches is left out in training by\n"
        "patch_drop_rate of timm's vision transformers, by patch_dropout of open_clip's.",
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return _tower_name(name, IMAGE_LIBRARIES)


class TextTowerConfig(TowerConfig):
    """The text tower."""

    name: str = Field(
        default="hf:bert",
        description="hf:ARCHITECTURE from scratch, hf:HUB-ID-OR-FOLDER, open_clip:NAME, or\n"
        "local:FOLDER (a bundle, or what one of those libraries wrote).",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of the model's configuration; also pretrained, and for hf attention\n"
        "and pooler (mean, max, cls, last, attention, native).",
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return _tower_name(name, TEXT_LIBRARIES)


class ModelConfig(Config):
    """Two towers and the space between them."""

    image: ImageTowerConfig = ImageTowerConfig()
    text: TextTowerConfig = TextTowerConfig()
    dim: PositiveInt = Field(default=256, description="Width of the aligned space.")
    image_size: PositiveInt = Field(default=224, description="Side of the pictures, in pixels.")
    context_length: PositiveInt = Field(default=77, description="Longest text, in tokens.")
    fit: Literal["crop", "squash"] = Field(
        default="crop",
        description="How a picture becomes square: its central square is cut out, or all of it is\n"
        "squeezed, as SigLIP has it. Training crops at random unless augment.crop is null.",
    )


class TokenizerConfig(Config):
    """Where the vocabulary comes from."""

    name: str | None = Field(
        default=None,
        description="clip (CLIP's own byte pairs), or a folder or hub id with a tokenizer.json in\n"
        "Hugging Face's format, whatever its kind; one that runs code of others is refused.\n"
        "null = that of a pretrained text tower, else trained on the captions (word pieces).",
    )
    vocabulary_size: PositiveInt = Field(
        default=8192, description="Largest vocabulary, where it is trained."
    )
    clean: Literal["none", "whitespace", "lower", "canonicalize"] | None = Field(
        default=None,
        description="What is done to a caption first: none; whitespace (broken encodings and HTML\n"
        "mended, single spaces), lower (and lower case), canonicalize (and no punctuation).\n"
        "null = lower for clip, as the pretrained text tower had it, else none.",
    )


class CropConfig(Config):
    """The random part of a picture that a step sees."""

    scale: tuple[PositiveFloat, PositiveFloat] = Field(
        default=(0.9, 1.0), description="Smallest and largest share of the area."
    )
    ratio: tuple[PositiveFloat, PositiveFloat] = Field(
        default=(0.75, 4 / 3), description="Smallest and largest width over height."
    )


class AugmentConfig(Config):
    """Random changes to training pictures, drawn from (seed, epoch, sample)."""

    enabled: bool = Field(default=True, description="false = pictures as they are.")
    crop: CropConfig | None = Field(
        default=CropConfig(),
        description="The part of a picture that is used: a random box; null = as model.fit says.",
    )
    decode_size: PositiveInt | None = Field(
        default=None,
        description="Side of the pictures that are augmented; null = model.image_size.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of shards.augment.Augment."
    )


class StageConfig(Config):
    """A first part of the run on smaller pictures, shorter texts, or both."""

    until: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="Share of the run at which it ends."
    )
    image_size: PositiveInt | None = Field(
        default=None, description="Side of the pictures, in pixels; null = model.image_size."
    )
    context_length: PositiveInt | None = Field(
        default=None,
        description="Captions are cut to so many tokens; null = model.context_length.",
    )

    @model_validator(mode="after")
    def _says_something(self) -> "StageConfig":
        if self.image_size is None and self.context_length is None:
            raise ValueError("a stage needs an image_size or a context_length")
        return self


_EVERY = "A number of samples; or with a unit: 500 steps, 1 epochs, 30 minutes."


class ValidationConfig(Config):
    """Evaluation while training, by all processes: retrieval on held-out pairs, and tasks."""

    data: Place | None = Field(default=None, description="Shards; null = none.")
    where: Where = Field(default_factory=dict, description=WHERE)
    every: Cadence = Field(default=100_000, description=_EVERY)
    tasks: dict[str, TaskConfig] = Field(
        default_factory=dict,
        description="Further evaluations by title, as in evaluate: {title: {task, data, where,\n"
        "label, templates}}.",
    )
    best: str | None = Field(
        default=None,
        description="Figure by which the best checkpoint is kept beyond the newest, such as\n"
        "text_to_image_recall@1, or TITLE/top1 of a task; null = none.",
    )


class PretrainConfig(Config):
    """A dual encoder trained with a contrastive objective."""

    positional: ClassVar[tuple[str, ...]] = ("data", "out")
    must_exist: ClassVar[tuple[str, ...]] = ("data",)

    data: Data = Field(
        description=f"{PLACE} Several are mixed by weight:\n"
        "[{data: a, weight: 2}, {data: b, weight: 1}]."
    )
    out: Path = Field(description="Run folder: config, metrics, checkpoints, bundle.")
    bundle: Path | None = Field(
        default=None, description="Where the trained model goes; null = bundle in out."
    )
    preset: str | None = Field(
        default=None,
        description=f"Other defaults for what follows: {', '.join(presets())}.\n"
        "What is given wins, key by key; --print shows what comes of it, and preset is null then.",
    )
    start_from: str | None = Field(
        default=None,
        description="A bundle, or a model of OpenCLIP or Hugging Face (as align.load takes them),\n"
        "to go on from with all of its weights: towers, projections, temperature and tokenizer.\n"
        "model and tokenizer are then its own, but trainable and layer_decay, and the sizes of\n"
        "pictures and texts where its towers take others.",
    )
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    caption_fields: list[CaptionField] = Field(
        default_factory=list,
        description=f"{CAPTION_FIELDS} One of several is drawn for each sample and epoch.",
    )
    captions: list[str] = Field(
        default=["{caption}"],
        min_length=1,
        description="Ways to write a caption, one drawn for each sample and epoch; {caption} or\n"
        "any field of the JSON member. Repeat one to draw it more often.",
    )
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    augment: AugmentConfig = AugmentConfig()
    stages: list[StageConfig] = Field(
        default_factory=list,
        description="Smaller pictures or shorter texts first: [{until: 0.6, image_size: 32}], or\n"
        "context_length, or both (Li et al. 2023, CLIPA); what remains of the run is at model's.",
    )
    batch_size: PositiveInt = Field(
        default=256, description="Global batch: all processes together."
    )
    micro_batch_size: PositiveInt | None = Field(
        default=None,
        description="Rows that go through the towers at a time; null = all that a process has.\n"
        "A second forward pass saves the memory; loss and gradients are those of the whole batch,\n"
        "but for batch normalisation, whose statistics are then those of each piece.",
    )
    samples: Length = Field(
        default=1_000_000,
        description="How many to train on in all; or with a unit: 5000 steps, 30 epochs.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="bf16", description="Of the towers; fp16 scales the loss."
    )
    shard_weights: bool = Field(
        default=False,
        description="Each process keeps its share of weights, gradients and optimiser state\n"
        "(FSDP2), for models that do not fit otherwise.",
    )
    text_chunks: PositiveInt = Field(
        default=4,
        description="Chunks of like length that a batch of captions is cut into, so that little\n"
        "padding is computed; small batches are cut into fewer. Rounding alone depends on it.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute activations again on the way back instead of keeping them: less\n"
        "memory, more time, the same gradients.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the towers with torch.compile: a slow first step, quicker ones then.",
    )
    seed: Seed = Field(default=0, description="Of weights, order, augmentation, dropout.")
    lanes: PositiveInt = Field(
        default=64,
        description="Parallel lanes the data is read in; a multiple of the number of processes,\n"
        "and a divisor of batch_size. Part of the order: changing it changes the order.",
    )
    workers: NonNegativeInt = Field(default=1, description="Decoding threads per process.")
    max_bad_fraction: BadFraction = 0.05
    strict: Strict = False
    log_every: PositiveInt = Field(default=20, description="Steps between log lines.")
    save_every: Cadence = Field(default=100_000, description=f"Between checkpoints. {_EVERY}")
    keep: PositiveInt = Field(default=2, description="Newest checkpoints to keep.")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list,
        description="Where metrics go beside metrics.jsonl; each needs its package.",
    )
    rank_timeout_s: PositiveFloat = Field(
        default=1800.0, description="How long processes wait for one that hangs or died."
    )
    validation: ValidationConfig = ValidationConfig()
    resume: bool = Field(default=False, description="Go on from the newest checkpoint in out.")

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, values: Any) -> Any:
        """What was given, over the preset that it names; what comes of it names none."""
        if not isinstance(values, dict) or values.get("preset") not in presets():
            return values
        base = preset(values["preset"])
        if values.get("start_from") is not None:  # which brings a temperature
            base.get("loss", {}).pop("temperature", None)
        return laid_under(base, {**values, "preset": None})

    @field_validator("preset")
    @classmethod
    def _is_known(cls, name: str | None) -> None:
        if name is not None:
            preset(name)

    @model_validator(mode="after")
    def _fits(self) -> "PretrainConfig":
        if self.batch_size % self.lanes:
            raise ValueError(
                f"batch_size: {self.batch_size} must be a multiple of lanes ({self.lanes})"
            )
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(
                f"batch_size: {self.batch_size} must be a multiple of micro_batch_size ({micro})"
            )
        if not self.data:
            raise ValueError("data: names no data set")
        ends = [stage.until for stage in self.stages]
        if ends != sorted(set(ends)):
            raise ValueError(f"stages: {ends} must ascend; a later stage ends later")
        if self.validation.data is not None and "validation" in self.validation.tasks:
            raise ValueError("validation.tasks: validation is the title of that on validation.data")
        if isinstance(self.samples, int) and self.samples < self.batch_size:
            raise ValueError(f"samples: {self.samples} is less than one batch ({self.batch_size})")
        return self
