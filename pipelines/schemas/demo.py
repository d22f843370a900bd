"""What `demo` can be told: the verbs it runs, with their paths filled in."""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pipelines.config import Config
from pipelines.schemas.evaluation import EvaluateConfig, FuseConfig
from pipelines.schemas.index import IndexConfig
from pipelines.schemas.training import PretrainConfig

DEMO_TASKS = ("unseen artist", "unseen artist, by subgroup", "unseen concepts")
BUILT_IN_SPLITS = ("train", "vendor", "unseen")


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
