"""The indexes that are served: each with its rows, its model and its pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from align.fusion.head import FusionHead
from align.fusion.store import head_fingerprint, load_head
from eval.search.searcher import Searcher
from pipelines.config import ConfigError
from pipelines.heads import heads_of
from pipelines.models import OpenModel, open_model
from pipelines.pictures import IndexPictures
from pipelines.queries import QueryEncoder
from pipelines.serve.batching import Batcher
from pipelines.serve.metrics import Metrics

_SAMPLE = 24


@dataclass(frozen=True)
class ServedIndex:
    """An index and what answers its queries.

    Attributes:
        name: What clients call it.
        searcher: Finds rows.
        encoder: Makes vectors of words and pictures; indexes of one model share it.
        pictures: The pictures of its rows, by id.
        has_pictures: Whether one was there when the server began.
        own_head: The fusion head that its rows were made with, where they are fused.
    """

    name: str
    searcher: Searcher
    encoder: Batcher
    pictures: IndexPictures
    has_pictures: bool
    own_head: str | None = None

    @property
    def heads(self) -> list[str]:
        """Names of the fusion heads of its model."""
        return [*self.encoder.encoder.heads]

    def summary(self) -> dict[str, Any]:
        """What a client has to know of it to ask."""
        searcher, card = self.searcher, self.searcher.card
        steps = np.linspace(0, len(searcher.ids) - 1, min(_SAMPLE, len(searcher.ids)))
        ids = np.unique(searcher.ids[steps.astype(np.int64)])
        ids = ids[searcher.places(ids) >= 0]  # removed rows are shown no more
        return {
            "name": self.name,
            "modality": card.modality,
            "rows": searcher.live,
            "dim": card.dim,
            "data": _last_of(card.origin.get("data")),
            "model": _last_of(card.origin.get("model")),
            "heads": self.heads,
            "fields": [
                {"name": f.name, "kind": f.kind, "values": f.values, "low": f.low, "high": f.high}
                for f in searcher.fields()
            ],
            "recall": {one.queries: one.at_10.value for one in card.reached},
            "factory": card.factory,
            "pictures": self.has_pictures,
            "sample": [
                {"id": row["id"], "caption": row.get("caption"), "picture": self.picture(row["id"])}
                for row in searcher.metadata(ids)
            ],
        }

    def picture(self, row_id: int) -> str:
        """Where a client finds the picture of a row."""
        return f"/api/pictures/{self.name}/{row_id}"


def open_indexes(
    folders: Mapping[str, Path],
    *,
    model: str | None,
    heads: Path | None,
    check: Literal["sha256", "sizes"],
    memory_map: bool,
    max_batch: int,
    max_waiting: int,
    metrics: Metrics,
) -> dict[str, ServedIndex]:
    """Open indexes, their models (each once) and the heads of these.

    Args:
        folders: Index folders by name.
        model: A model for all; None = those that the indexes were made with.
        heads: Folder with a folder for each fusion head; None = those in the bundles.
        check: As in :class:`Searcher`.
        memory_map: As in :class:`Searcher`.
        max_batch: As in :class:`Batcher`.
        max_waiting: As in :class:`Batcher`.
        metrics: As in :class:`Batcher`.

    Raises:
        ConfigError: A model is not the one that an index was made with, or nobody knows which.
        ValueError: An index, a model or a head is missing or damaged.
    """
    opened: dict[str, OpenModel] = {}
    encoders: dict[str, Batcher] = {}
    served = {}
    for name, folder in folders.items():
        searcher = Searcher(folder, check=check, memory_map=memory_map)
        place = model or searcher.card.origin.get("model")
        if place is None:
            raise ConfigError(
                f"model: {folder} does not say which model it was made with; name it (model=...)"
            )
        if place not in opened:
            opened[place] = open_model(place)
        one = opened[place]
        # An index of another tool may not say which model it was made with.
        made_with = searcher.card.fingerprints.get("model") or one.fingerprint
        if made_with != one.fingerprint or searcher.card.dim != one.model.config.dim:
            raise ConfigError(
                f"{place}: not the model that {folder} was made with; embed and index again"
            )
        if one.fingerprint not in encoders:
            encoders[one.fingerprint] = Batcher(
                QueryEncoder(one.model, _heads(heads, one)),
                max_batch=max_batch,
                max_waiting=max_waiting,
                metrics=metrics,
            )
        pictures = IndexPictures(searcher.card.sources)
        encoder = encoders[one.fingerprint]
        served[name] = ServedIndex(
            name,
            searcher,
            encoder,
            pictures,
            _is_there(pictures, searcher),
            _own_head(searcher, encoder.encoder, one.fingerprint),
        )
    metrics.watch_queue(lambda: sum(encoder.waiting for encoder in encoders.values()))
    return served


def _heads(folder: Path | None, model: OpenModel) -> dict[str, FusionHead]:
    if folder is None:
        return heads_of(model.place, towers=model.fingerprint)
    if (folder / "head.json").is_file():
        return {folder.name: load_head(folder, towers=model.fingerprint)}
    places = sorted(path.parent for path in folder.glob("*/head.json"))
    if not places:
        raise ConfigError(f"heads: {folder} holds no fusion head; train some with align fuse")
    return {place.name: load_head(place, towers=model.fingerprint) for place in places}


def _own_head(searcher: Searcher, encoder: QueryEncoder, towers: str) -> str | None:
    """The name of the head that fused the rows, which the encoder is given; None where none did.

    Raises:
        ConfigError: It is no longer there, or another one lies in its place.
    """
    card = searcher.card
    place = card.origin.get("head") if card.modality == "fused" else None
    if place is None:
        return None
    if not Path(place).is_dir() or head_fingerprint(place) != card.fingerprints.get("head"):
        raise ConfigError(
            f"the rows of an index were fused by the head in {place}, which is no longer there; "
            "embed and index again"
        )
    # Folders of different heads may have one name.
    name = f"{Path(place).name}-{card.fingerprints['head'][:8]}"
    if name not in encoder.heads:
        encoder.heads[name] = load_head(place, towers=towers)
    return name


def _is_there(pictures: IndexPictures, searcher: Searcher) -> bool:
    try:
        pictures[int(searcher.ids[0])]
    except (ValueError, OSError):
        return False
    return True


def _last_of(place: Any) -> str | None:
    """The end of a place: enough to know it by, and no map of the server's folders."""
    if place is None:
        return None
    parts: Sequence[str] = [part for part in str(place).split("/") if part]
    return "/".join(parts[-2:])
