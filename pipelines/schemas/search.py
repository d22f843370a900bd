"""What `search` can be told."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    FiniteFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from pipelines.config import Config
from pipelines.schemas.values import NonNegativeInt

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = {".json": "json", ".jsonl": "jsonl", ".csv": "csv"}
"""Suffix of a file of hits, and the format it says."""
QUERY_SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
Format = Literal["table", "picture", "json", "jsonl", "csv"]


def _several(value: Any) -> Any:
    """One value stands for a list of it; a number may be meant as a text or a path."""
    given = value if isinstance(value, list) else [value]
    return [str(one) if isinstance(one, int | float) else one for one in given]


def _numbers(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class TermConfig(Config):
    """One part of a query, with its weight."""

    must_exist: ClassVar[tuple[str, ...]] = ("image",)

    text: str | None = Field(default=None, description="Words.")
    image: Path | None = Field(default=None, description="A picture.")
    id: NonNegativeInt | None = Field(default=None, description="A row of the index.")
    weight: FiniteFloat = Field(default=1.0, description="How much it counts; below 0: away from.")

    @model_validator(mode="after")
    def _one(self) -> "TermConfig":
        if sum(one is not None for one in (self.text, self.image, self.id)) != 1:
            raise ValueError("a term has one of text, image and id")
        return self


class QueryConfig(Config):
    """What to look for, and what may be found."""

    must_exist: ClassVar[tuple[str, ...]] = ("image", "terms")

    text: str | None = Field(default=None, description="What to look for, in words.")
    image: Annotated[list[Path], BeforeValidator(_several)] = Field(
        default_factory=list, description="A picture to look for, or several."
    )
    minus: Annotated[list[str], BeforeValidator(_several)] = Field(
        default_factory=list, description="Words to move away from: one text, or several."
    )
    terms: list[TermConfig] = Field(
        default_factory=list,
        description="Weighted parts: [{text: red car, weight: 1}, {image: a.png, weight: 0.5},\n"
        "{id: 17, weight: -0.3}].",
    )
    like: Annotated[list[NonNegativeInt], BeforeValidator(_numbers)] = Field(
        default_factory=list, description="Rows to find more of, by id; they are not found again."
    )
    head: str | None = Field(
        default=None,
        description="A trained fusion head for picture and words together: its name in the bundle\n"
        "or its folder; null = their sum.",
    )
    balance: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="Between pictures (0) and words (1); null = 0.5, both alike.",
    )
    where: str | None = Field(
        default=None, description="Which rows, in SQL over the metadata: vendor = 'noto'."
    )
    fields: dict[str, Any] = Field(
        default_factory=dict,
        description="Which rows: {vendor: [noto, fluent], year: {min: 2000}, caption: {contains: "
        "red}}.",
    )
    k: PositiveInt = Field(default=12, description="How many hits.")
    offset: NonNegativeInt = Field(default=0, description="Leave out so many of the best.")
    min_score: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        default=None, description="Only hits with at least this cosine similarity."
    )
    collapse: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Hits that are this similar to each other become one: 0.98."
    )
    diversity: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="From the most similar (0) to the most different hits (1)."
    )

    @property
    def asks(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self.text or self.image or self.minus or self.terms or self.like)


class SearchConfig(QueryConfig):
    """Pictures for words, pictures, or both, added, subtracted or fused; filtered by metadata."""

    positional: ClassVar[tuple[str, ...]] = ("text",)
    must_exist: ClassVar[tuple[str, ...]] = ("index", "image", "terms", "queries")

    index: Path = Field(default=Path("runs/demo/index"), description="Folder of the index.")
    model: str | None = Field(
        default=None, description="The model; null = the one the index was made with."
    )
    check: Literal["sha256", "sizes"] = Field(
        default="sha256",
        description="On opening the index, read all its files, or only compare counts (quick).",
    )
    memory_map: bool = Field(
        default=False, description="Leave the FAISS index on disk: one larger than the memory."
    )
    queries: Path | None = Field(
        default=None,
        description="Many queries: .txt (a text a line), .jsonl (the keys above), .csv, .parquet\n"
        "(columns with the names of these keys). Keys given beside hold for all of them.",
    )
    batch_size: PositiveInt = Field(default=256, description="Queries at a time.")
    format: Format | None = Field(
        default=None,
        description="table, picture, json, jsonl or csv; null = by the suffix of out, else table.",
    )
    out: Path | None = Field(
        default=None,
        description="Where hits go; null = json, jsonl and csv are printed, and a picture of the\n"
        "hits is search.png.",
    )

    @field_validator("out")
    @classmethod
    def _writable(cls, out: Path | None) -> Path | None:
        if out is not None and out.is_dir():
            raise ValueError(f"{out} is a folder and no picture file; name one, such as hits.png")
        return out

    @field_validator("queries")
    @classmethod
    def _readable(cls, queries: Path | None) -> Path | None:
        if queries is not None and queries.suffix.lower() not in QUERY_SUFFIXES:
            raise ValueError(f"{queries} is no file of queries; known: {', '.join(QUERY_SUFFIXES)}")
        return queries

    @property
    def output(self) -> Format:
        """The format that was asked for, or that the file says."""
        said = FORMATS.get(self.out.suffix.lower(), "table") if self.out else "table"
        return self.format or said  # pyright: ignore[reportReturnType]

    @property
    def drawing(self) -> Path:
        """Where the picture of the hits goes."""
        return self.out or Path("search.png")

    @model_validator(mode="after")
    def _asks(self) -> "SearchConfig":
        draws = self.output in ("table", "picture")
        if draws and self.drawing.suffix.lower() not in PICTURE_SUFFIXES:
            raise ValueError(
                f"out: {self.out} is no picture file; name one, such as hits.png, or hits.json, "
                "hits.jsonl or hits.csv"
            )
        if self.queries is None and not self.asks:
            raise ValueError('give a text to look for, as in: align search "red heart"')
        if self.queries is not None and self.text:
            raise ValueError("text: each of the queries has its own; give either")
        return self
