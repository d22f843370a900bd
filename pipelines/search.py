"""`align search`: pictures for words, for a picture, or for a picture and a change in words."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F

from align.bundle import fingerprint, load
from align.fusion.head import FusionHead, Modality
from align.fusion.store import load_head
from align.model import DualEncoder
from eval.search.searcher import Searcher
from pipelines.config import ConfigError
from pipelines.pictures import GridHit, Pictures, draw_grid
from pipelines.schemas import SearchConfig


def run(config: SearchConfig) -> int:
    """Search, print the hits, draw them."""
    picture = open_picture(config.image) if config.image else None
    searcher = Searcher(config.index)
    place = config.model or searcher.card.origin.get("model")
    if place is None:
        raise ConfigError(f"model: {config.index} does not say which model it was made with")
    towers = fingerprint(place)
    if towers != searcher.card.fingerprints["model"]:
        raise ConfigError(
            f"{place}: not the model that {config.index} was made with; embed and index again"
        )
    head = load_head(config.head, towers=towers) if config.head else None
    query = embed_query(load(place), text=config.text, picture=picture, head=head)
    found = searcher.search(query, config.k)
    asked = " + ".join(
        part for part in (str(config.image) if config.image else "", config.text or "") if part
    )
    print(f"{asked}  ({searcher.card.rows} pictures in {config.index})")
    for place_, (score, row) in enumerate(zip(found.scores[0], found.rows[0], strict=True), 1):
        print(f"{place_:3d}  {score:6.3f}  {row['caption']}  [{row['key']}]")
    data = searcher.card.origin.get("data", "unknown")
    try:
        pictures = Pictures(data)
    except (ValueError, OSError) as error:
        print(f"no picture drawn: the shards are no longer at {data} ({error})")
        return 0
    if pictures.manifest.fingerprint != searcher.card.sources[0].data:
        print(f"no picture drawn: {data} holds other samples than were embedded; embed it again")
        return 0
    hits = [
        GridHit(pictures[row["id"]], row["caption"], float(score))
        for score, row in zip(found.scores[0], found.rows[0], strict=True)
    ]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    beside = config.out.with_name(f".writing-{config.out.name}")
    draw_grid(asked, hits).save(beside)
    beside.replace(config.out)
    print(f"picture: {config.out}")
    return 0


def open_picture(path: Path) -> Image.Image:
    """Open a picture of the user's.

    Raises:
        ConfigError: it is missing or no picture.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except FileNotFoundError as error:
        raise ConfigError(f"image: there is no file {path}") from error
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"image: {path} cannot be read as a picture ({error})") from error


@torch.no_grad()
def embed_query(
    model: DualEncoder,
    *,
    text: str | None,
    picture: Image.Image | None,
    head: FusionHead | None = None,
) -> np.ndarray:
    """One unit-length row for a text, a picture, or both.

    Both together go through the head, or without one become their mean.
    """
    if picture is None or not text:
        one = model.encode_text([text]) if text else model.encode_image([picture])  # type: ignore[list-item]
        return one.numpy()
    if head is None:
        both = model.encode_image([picture]) + model.encode_text([text])
        return F.normalize(both, dim=-1).numpy()
    images = model.image_features(model.preprocess([picture]))
    tokens = model.tokenize([text])
    texts = model.text_features(tokens.ids, tokens.mask)
    fused = head(
        Modality(model.project_image(images.pooled), images.tokens, images.mask),
        Modality(model.project_text(texts.pooled), texts.tokens, texts.mask),
    )
    return fused.embedding.numpy()


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("search")
