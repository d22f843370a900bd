"""What each verb can be told: every key, its type, its default and what it means.

Nothing here imports torch. `align config VERB` prints these with their comments.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from align.fusion import FUSION_HEADS
from pipelines.config import Config

Seed = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, lt=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Where = dict[str, str | int | float | bool | list[str | int | float | bool]]
WHERE = (
    "Keep samples whose field has this value, or one of these values: {field: value or [values]}."
)
DEMO_TASKS = ("unseen artist", "unseen artist, by subgroup", "unseen concepts")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
BUILT_IN_SPLITS = ("train", "vendor", "unseen")
IMAGE_LIBRARIES = ("timm",)
TEXT_LIBRARIES = ("hf",)


def _tower_name(name: str, libraries: tuple[str, ...]) -> str:
    library, separator, rest = name.partition(":")
    if not separator or not rest or library not in libraries:
        known = ", ".join(f"{library}:NAME" for library in libraries)
        raise ValueError(f"unknown tower {name!r}; known: {known}")
    return name


class PackConfig(Config):
    """Image-text pairs into WebDataset shards with a manifest."""

    positional: ClassVar[tuple[str, ...]] = ("source", "out")
    must_exist: ClassVar[tuple[str, ...]] = ("source",)

    source: Path | list[Path] = Field(
        description="Parquet file or files with image bytes, or a folder of pictures with\n"
        ".txt or .json files of the same name beside them."
    )
    out: Path = Field(description="Folder for the shards; must be new or empty.")
    where: Where = Field(default_factory=dict, description=WHERE + " Parquet only.")
    image: str = Field(default="image", description="Column of the encoded picture. Parquet only.")
    caption: str = Field(default="caption", description="Column of the caption. Parquet only.")
    key: str | None = Field(
        default=None,
        description="Names a sample from its columns, such as '{vendor}-{codepoints}';\n"
        "null = file name and row. Parquet only.",
    )
    samples_per_shard: PositiveInt = Field(default=1000, description="Samples in one tar.")
    shuffle_seed: int | None = Field(
        default=None, description="Mix the samples before writing; null keeps the source's order."
    )
    strict: bool = Field(default=False, description="Stop at the first bad pair.")
    overwrite: bool = Field(default=False, description="Replace a data set packed earlier.")


class ImageTowerConfig(Config):
    """The image tower."""

    name: str = Field(default="timm:resnet18", description="timm:ARCHITECTURE.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Passed to timm.create_model; also pretrained, mean, std.",
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return _tower_name(name, IMAGE_LIBRARIES)


class TextTowerConfig(Config):
    """The text tower."""

    name: str = Field(
        default="hf:bert", description="hf:ARCHITECTURE from scratch, or hf:HUB-ID-OR-FOLDER."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of the model's configuration; also pretrained and\n"
        "pooler (mean, max, cls, last).",
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


class TokenizerConfig(Config):
    """Where the vocabulary comes from."""

    name: str | None = Field(
        default=None, description="Folder or hub id of a tokenizer; null = trained on the captions."
    )
    vocabulary_size: PositiveInt = Field(
        default=8192, description="Largest vocabulary, where it is trained."
    )


class LossConfig(Config):
    """InfoNCE with a learnable temperature."""

    temperature: PositiveFloat = Field(default=0.07, description="Where it starts.")
    min_temperature: PositiveFloat = Field(default=0.01, description="How low it may go.")
    label_smoothing: Share = Field(default=0.0, description="Share of the target spread evenly.")
    positives: str = Field(
        default="caption",
        description="Samples that agree in this field are right for each other:\n"
        "caption, or a field of the JSON member.",
    )


class OptimizerConfig(Config):
    """The optimiser, its linear warm-up and half a cosine."""

    name: str = Field(default="adamw", description="adamw, or any optimiser of timm, such as muon.")
    options: dict[str, Any] = Field(
        default={"betas": [0.9, 0.98]}, description="Keyword arguments of the optimiser."
    )
    learning_rate: PositiveFloat = Field(default=5e-4, description="At its peak.")
    floor: Share = Field(default=0.0, description="Where the cosine ends, as a share of the peak.")
    warmup: Share = Field(default=0.05, description="Share of the run that warms up.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.1, description="On matrices and kernels; never on gains, biases, temperature."
    )
    max_grad_norm: PositiveFloat = Field(default=1.0, description="Longer gradients are cut.")
    average: Share = Field(
        default=0.0,
        description="Decay of the running average of the weights, which is then what is\n"
        "evaluated and saved; 0 = none.",
    )


class AugmentConfig(Config):
    """Random changes to training pictures, drawn from (seed, epoch, sample)."""

    enabled: bool = Field(default=True, description="false = pictures as they are.")
    decode_size: PositiveInt | None = Field(
        default=None,
        description="Side of the pictures that are augmented; null = model.image_size.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of shards.augment.Augment."
    )


class StageConfig(Config):
    """A first part of the run on smaller pictures."""

    until: Share = Field(description="Share of the run at which it ends.")
    image_size: PositiveInt = Field(description="Side of the pictures, in pixels.")


class ValidationConfig(Config):
    """Retrieval on held-out pairs while training."""

    data: Path | None = Field(default=None, description="Shards; null = none.")
    where: Where = Field(default_factory=dict, description=WHERE)
    every: PositiveInt = Field(default=100_000, description="After this many samples.")


class PretrainConfig(Config):
    """A dual encoder trained with a contrastive objective."""

    positional: ClassVar[tuple[str, ...]] = ("data", "out")
    must_exist: ClassVar[tuple[str, ...]] = ("data",)

    data: Path = Field(description="Folder of training shards.")
    out: Path = Field(description="Run folder: config, metrics, checkpoints, bundle.")
    bundle: Path | None = Field(
        default=None, description="Where the trained model goes; null = bundle in out."
    )
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
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
        description="Smaller pictures first: [{until: 0.6, image_size: 32}]; what remains of the\n"
        "run is at model.image_size.",
    )
    batch_size: PositiveInt = Field(
        default=256, description="Global batch: all processes together."
    )
    samples: PositiveInt = Field(default=1_000_000, description="How many to train on in all.")
    precision: Literal["fp32", "bf16"] = Field(default="bf16", description="Of the towers.")
    seed: Seed = Field(default=0, description="Of weights, order, augmentation, dropout.")
    lanes: PositiveInt = Field(
        default=64,
        description="Parallel lanes the data is read in; a multiple of the number of processes,\n"
        "and a divisor of batch_size. Part of the order: changing it changes the order.",
    )
    workers: NonNegativeInt = Field(default=1, description="Decoding threads per process.")
    max_bad_fraction: Share = Field(
        default=0.05, description="The run stops where more of the samples are bad."
    )
    strict: bool = Field(default=False, description="Stop at the first bad sample.")
    log_every: PositiveInt = Field(default=20, description="Steps between log lines.")
    save_every: PositiveInt = Field(default=100_000, description="Samples between checkpoints.")
    keep: PositiveInt = Field(default=2, description="Checkpoints to keep.")
    validation: ValidationConfig = ValidationConfig()
    resume: bool = Field(default=False, description="Go on from the newest checkpoint in out.")

    @model_validator(mode="after")
    def _fits(self) -> "PretrainConfig":
        if self.batch_size % self.lanes:
            raise ValueError(
                f"batch_size: {self.batch_size} must be a multiple of lanes ({self.lanes})"
            )
        ends = [stage.until for stage in self.stages]
        if ends != sorted(set(ends)):
            raise ValueError(f"stages: {ends} must ascend; a later stage ends later")
        if self.samples < self.batch_size:
            raise ValueError(f"samples: {self.samples} is less than one batch ({self.batch_size})")
        return self


class EmbedConfig(Config):
    """Shards through a model into an embedding table."""

    positional: ClassVar[tuple[str, ...]] = ("model", "data", "out")
    must_exist: ClassVar[tuple[str, ...]] = ("data",)

    model: str = Field(description="A bundle: folder or hub id.")
    data: Path = Field(description="Folder of shards.")
    out: Path = Field(description="Folder of the table.")
    texts: bool = Field(default=True, description="Embed captions too.")
    dtype: Literal["float16", "float32"] = Field(default="float16", description="Of the table.")
    rows_per_part: PositiveInt = Field(default=100_000, description="Rows in one part.")
    batch_size: PositiveInt = Field(default=256, description="Pictures at a time.")


class IndexConfig(Config):
    """An embedding table into a FAISS index."""

    positional: ClassVar[tuple[str, ...]] = ("table", "out")
    must_exist: ClassVar[tuple[str, ...]] = ("table",)

    table: Path = Field(description="Folder that `align embed` wrote.")
    out: Path = Field(description="Folder of the index.")
    factory: str = Field(default="Flat", description="FAISS factory string.")
    knobs: str = Field(default="", description="FAISS search parameters, such as nprobe=16.")
    modality: Literal["image", "text"] = Field(default="image", description="What to index.")
    seed: Seed = Field(default=0, description="Of the training sample.")


class SearchConfig(Config):
    """Pictures for a text, a picture, or both."""

    positional: ClassVar[tuple[str, ...]] = ("text",)
    must_exist: ClassVar[tuple[str, ...]] = ("index", "image", "head")

    text: str | None = Field(default=None, description="What to look for, in words.")
    image: Path | None = Field(default=None, description="A picture to look for.")
    index: Path = Field(default=Path("runs/demo/index"), description="Folder of the index.")
    model: str | None = Field(
        default=None, description="A bundle; null = the one the index was made with."
    )
    head: Path | None = Field(
        default=None,
        description="A trained fusion head for picture and text together; null = their mean.",
    )
    k: PositiveInt = Field(default=12, description="How many hits.")
    out: Path = Field(default=Path("search.png"), description="Picture of the hits.")

    @field_validator("out")
    @classmethod
    def _picture(cls, out: Path) -> Path:
        if out.suffix.lower() not in PICTURE_SUFFIXES or out.is_dir():
            raise ValueError(f"{out} is no picture file; name one, such as hits.png")
        return out

    @model_validator(mode="after")
    def _asks(self) -> "SearchConfig":
        if not self.text and self.image is None:
            raise ValueError('give a text to look for, as in: align search "red heart"')
        return self


class TaskConfig(Config):
    """One evaluation."""

    task: Literal["zero_shot", "retrieval"] = Field(description="Which evaluation.")
    data: Path = Field(description="Folder of shards.")
    where: Where = Field(default_factory=dict, description=WHERE)
    label: str = Field(default="caption", description="Field that holds the class, or the caption.")
    templates: list[str] = Field(default=["{}"], description="Prompts around a class name.")


class EvaluateConfig(Config):
    """A model on zero-shot classification and retrieval, with 95 % intervals."""

    positional: ClassVar[tuple[str, ...]] = ("model", "data")
    must_exist: ClassVar[tuple[str, ...]] = ("data",)

    model: str = Field(description="A bundle: folder or hub id.")
    data: Path | None = Field(
        default=None, description="Shards for a plain retrieval task, where no tasks are given."
    )
    tasks: dict[str, TaskConfig] = Field(
        default_factory=dict,
        description="Evaluations by title: {title: {task: retrieval or zero_shot, data, where,\n"
        "label, templates}}.",
    )
    out: Path | None = Field(
        default=None, description="Folder for results.json; null = print only."
    )
    batch_size: PositiveInt = Field(default=256, description="Pictures at a time.")

    @model_validator(mode="after")
    def _something(self) -> "EvaluateConfig":
        if not self.tasks and self.data is None:
            raise ValueError("give data, as in: align evaluate BUNDLE SHARDS; or tasks")
        return self


class HeadConfig(Config):
    """One fusion head."""

    name: str = Field(description="A registered head, or package.module:Name.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the head.")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FUSION_HEADS and ":" not in name:
            raise ValueError(
                f"unknown fusion head {name!r}; known: {', '.join(FUSION_HEADS)}, "
                "or package.module:Name"
            )
        return name


class FuseConfig(Config):
    """Fusion heads on composed retrieval: a picture and a change in words find the target."""

    must_exist: ClassVar[tuple[str, ...]] = ("data", "pairs", "test_data", "index", "test_pairs")

    model: str = Field(description="A bundle: folder or hub id.")
    data: Path = Field(description="Shards of the pictures to train on.")
    pairs: Path = Field(
        description="Training queries, Parquet: reference and target (keys), change (text),\n"
        "kind, base (what relatives share)."
    )
    test_data: Path = Field(description="Shards of the pictures to search.")
    index: Path = Field(description="Index of test_data's pictures by the same model.")
    test_pairs: Path = Field(description="Test queries; no base of theirs may be in pairs.")
    within: str | None = Field(
        default=None, description="Field in which a training query and its candidates agree."
    )
    heads: dict[str, HeadConfig] = Field(
        default={name: HeadConfig(name=name) for name in FUSION_HEADS},
        min_length=1,
        description="Heads to compare, by title.",
    )
    out: Path = Field(description="Run folder: results.json and the trained heads.")
    steps: PositiveInt = Field(default=500, description="Training steps of every head.")
    batch_size: PositiveInt = Field(default=256, description="Queries a step.")
    learning_rate: PositiveFloat = Field(default=1e-3, description="At its peak.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.01, description="On matrices.")
    temperature: PositiveFloat = Field(default=0.05, description="Of the contrastive loss.")
    seed: Seed = Field(default=0, description="Of weights and batches.")


class DemoConfig(Config):
    """Everything on the built-in data: pack, pretrain, embed, index, search, evaluate, fuse."""

    out: Path = Field(default=Path("runs/demo"), description="Folder of everything.")
    restart: bool = Field(default=False, description="Throw away what is there and begin anew.")
    pretrain: PretrainConfig = Field(description="As for the verb; paths are filled in.")
    evaluate: EvaluateConfig = Field(description="As for the verb; paths are filled in.")
    index: IndexConfig = Field(description="As for the verb; paths are filled in.")
    fuse: FuseConfig = Field(description="As for the verb; paths are filled in.")
    queries: list[str] = Field(
        default=["red heart"], min_length=1, description="Searches for the page to show."
    )

    @model_validator(mode="after")
    def _shows(self) -> "DemoConfig":
        """The page is made of these evaluations."""
        missing = [title for title in DEMO_TASKS if title not in self.evaluate.tasks]
        if missing:
            raise ValueError(f"evaluate.tasks: the demo's page needs {missing[0]!r}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_in_paths(cls, values: Any) -> Any:
        """Every stage reads what the one before it wrote, all under `out`."""
        if not isinstance(values, dict):
            return values
        out = Path(str(values.get("out", cls.model_fields["out"].default)))
        places: dict[str, dict[str, Any]] = {
            "pretrain": {
                "data": out / "shards" / "train",
                "out": out / "pretrain",
                "bundle": out / "bundle",
            },
            "evaluate": {"model": str(out / "bundle"), "out": out / "evaluate"},
            "index": {"table": out / "table", "out": out / "index"},
            "fuse": {
                "model": str(out / "bundle"),
                "data": out / "shards" / "train",
                "pairs": out / "pairs" / "train.parquet",
                "test_data": out / "shards" / "vendor",
                "index": out / "index",
                "test_pairs": out / "pairs" / "test.parquet",
                "out": out / "fuse",
            },
        }
        filled = dict(values)
        for section, paths in places.items():
            given = filled.get(section) or {}
            if not isinstance(given, dict):
                continue
            for key, place in paths.items():
                if str(given.get(key, place)) != str(place):
                    raise ValueError(
                        f"{section}.{key}: the demo puts this at {place}; change out instead"
                    )
            filled[section] = {**given, **paths}
        return _fill_in_splits(filled, out / "shards")


def _fill_in_splits(values: Any, shards: Path) -> Any:
    """`data: vendor` anywhere means that split of the built-in data, packed under `out`."""
    if not isinstance(values, dict):
        return values
    return {
        key: shards / value
        if key == "data" and isinstance(value, str) and value in BUILT_IN_SPLITS
        else _fill_in_splits(value, shards)
        for key, value in values.items()
    }
