"""What `serve` can be told."""

import re
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipelines.config import Config

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class ServeConfig(Config):
    """A page and an HTTP interface over one or several indexes."""

    positional: ClassVar[tuple[str, ...]] = ("index",)
    must_exist: ClassVar[tuple[str, ...]] = ("index", "heads", "token_file")

    index: Path | None = Field(default=None, description="Folder of an index.")
    indexes: dict[str, Path] = Field(
        default_factory=dict, description="Several indexes: {name: folder}."
    )
    model: str | None = Field(
        default=None, description="A model for all of them; null = the ones they were made with."
    )
    heads: Path | None = Field(
        default=None,
        description="Folder of trained fusion heads; null = `heads` in the bundle, where it is.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen at; 0.0.0.0 = all.")
    port: int = Field(default=8000, ge=0, lt=65_536, description="0 = any that is free.")
    hosts: list[str] = Field(
        default_factory=list,
        description="Names in the address by which clients may call it; [] = any, but localhost\n"
        "alone where it listens there and wants no token.",
    )
    token: str | None = Field(
        default=None, min_length=1, description="What clients must know; null = open to all."
    )
    token_file: Path | None = Field(default=None, description="A file with the token in it.")
    check: Literal["sha256", "sizes"] = Field(
        default="sha256", description="How indexes are checked on opening."
    )
    memory_map: bool = Field(default=False, description="Leave the FAISS indexes on disk.")
    threads: NonNegativeInt = Field(default=0, description="Searches at a time; 0 = one a core.")
    max_batch: PositiveInt = Field(default=32, description="Queries in one encoder call.")
    max_waiting: PositiveInt = Field(
        default=1024, description="Requests under way; more are told to come back (503)."
    )
    max_connections: PositiveInt = Field(
        default=4096, description="Open at a time, idle ones too; more are closed (503)."
    )
    max_body_mb: PositiveFloat = Field(default=20.0, description="Size of a request, in MB.")
    max_pixels: PositiveInt = Field(default=64_000_000, description="Of a picture that is sent.")
    max_k: PositiveInt = Field(default=1000, description="Hits of one request.")
    max_offset: PositiveInt = Field(default=10_000, description="How deep a grid goes.")
    timeout: PositiveFloat = Field(default=30.0, description="Seconds for an answer (504).")
    read_timeout: PositiveFloat = Field(
        default=15.0, description="Seconds for a client to send headers, and a body (408)."
    )

    @model_validator(mode="after")
    def _serves(self) -> "ServeConfig":
        if self.index is None and not self.indexes:
            raise ValueError("give an index to serve, as in: align serve runs/demo/index")
        if self.token is not None and self.token_file is not None:
            raise ValueError("give token or token_file, not both")
        if bad := [name for name in self.indexes if not _NAME.fullmatch(name)]:
            raise ValueError(
                f"indexes: {bad[0]!r} is no name for an index; use letters, digits, - _ ."
            )
        if self.index is not None and self.name in self.indexes:
            raise ValueError(f"indexes: {self.name!r} is there twice; leave `index` out")
        return self

    @property
    def name(self) -> str:
        """What `index` is called: its folder's name, where that is a name."""
        last = (self.index or Path()).resolve().name
        return last if _NAME.fullmatch(last) else "index"

    @property
    def folders(self) -> dict[str, Path]:
        """All index folders by name."""
        first = {} if self.index is None else {self.name: self.index}
        return {**first, **self.indexes}

    def missing_places(self) -> list[str]:
        """As everywhere, and the folders of `indexes`."""
        missing = [
            f"indexes.{name}: there is no file or folder {folder}"
            for name, folder in self.indexes.items()
            if not folder.exists()
        ]
        return super().missing_places() + missing
