"""`align fuse`: fusion heads on composed retrieval, against what needs no head.

A query is a picture and a change in words ("blue instead of red"); the answer is the picture with
that change, found through FAISS among all test pictures but the query's own.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyarrow import ArrowInvalid, parquet
from torch.nn import functional as F
from tqdm import tqdm

from align.bundle import load
from align.fusion import fusion_head
from align.fusion.head import FusionHead
from align.fusion.store import save_head
from align.fusion.training import ComposedQueries, FeatureBank, fuse_all, train_head
from align.model import DualEncoder
from eval.compare import compare
from eval.results import Report, format_table
from eval.search.searcher import Searcher
from eval.tasks import composed_retrieval
from pipelines import run_folder
from pipelines.config import ConfigError
from pipelines.models import model_fingerprint
from pipelines.schemas import FuseConfig, HeadConfig
from shards.crop import FITS
from shards.loader import iterate
from shards.manifest import Manifest


@dataclass(frozen=True)
class Pairs:
    """Composed queries as they stand in their file, one entry a query."""

    reference: list[str]
    target: list[str]
    change: list[str]
    kind: list[str]
    base: list[str]

    def __len__(self) -> int:
        return len(self.reference)

    @classmethod
    def read(cls, path: Path) -> "Pairs":
        """Read the Parquet file.

        Raises:
            ConfigError: it is missing, no Parquet, empty, or lacks a column.
        """
        names = ["reference", "target", "change", "kind", "base"]
        try:
            table = parquet.read_table(path)
        except FileNotFoundError as error:
            raise ConfigError(f"pairs: there is no file {path}") from error
        except ArrowInvalid as error:
            raise ConfigError(f"pairs: {path} is not a Parquet file ({error})") from error
        for name in names:
            if name not in table.column_names:
                raise ConfigError(
                    f"pairs: {path} has no column {name!r}; it has {', '.join(table.column_names)}"
                )
        if not len(table):
            raise ConfigError(f"pairs: {path} holds no query")
        return cls(*(table[name].to_pylist() for name in names))


@dataclass(frozen=True)
class PictureSet:
    """The pictures of a data set.

    Attributes:
        embeddings: of all of them, unit length.
        bank: features of those that are part of queries.
        rows: where each key stands in `embeddings`.
        bank_rows: where each key of a query stands in `bank`.
        ids: stable sample ids.
        fields: the JSON members.
    """

    embeddings: torch.Tensor
    bank: FeatureBank
    rows: dict[str, int]
    bank_rows: dict[str, int]
    ids: np.ndarray
    fields: list[dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """What `align fuse` finds out.

    Attributes:
        reports: by method: image only, text only, sum, then each head by title.
        gains: of each head over the plain sum, paired.
        costs: of each head: parameters, seconds of training, milliseconds a query.
        pairs: the test queries.
    """

    reports: dict[str, Report]
    gains: dict[str, Report]
    costs: dict[str, dict[str, int | float]]
    pairs: Pairs

    @property
    def best(self) -> str:
        """The head with the highest recall@1 on the test queries."""
        return max(self.gains, key=lambda name: self.reports[name]["recall@1"].value)


def run(config: FuseConfig) -> int:
    """Compare, print the table, keep figures and heads."""
    comparison = compare_heads(load(config.model), config)
    print(format_table(comparison.reports.values()))
    print()
    print(format_table(comparison.gains.values()))
    for name, costs in comparison.costs.items():
        listed = ", ".join(f"{cost} {value:,.4g}" for cost, value in costs.items())
        print(f"{name}: {listed}")
    print(f"figures and heads: {config.out}")
    return 0


def compare_heads(model: DualEncoder, config: FuseConfig) -> Comparison:
    """Train every head on cached features and measure it beside the plain queries."""
    heads = {name: build_head(head, model, config.seed) for name, head in config.heads.items()}
    train_pairs, test_pairs = Pairs.read(config.pairs), Pairs.read(config.test_pairs)
    shared = sorted(set(train_pairs.base) & set(test_pairs.base))
    if shared:
        raise ConfigError(
            f"test_pairs: {config.test_pairs} shares the base {shared[0]!r} with {config.pairs}; "
            "hold whole bases out, or siblings give the answer away"
        )
    with run_folder.locked(config.out):
        run_folder.record(config.out, config)
        towers = model_fingerprint(model, config.model)
        searcher = open_matching_index(config, towers)
        train_set = picture_features(model, config.data, set(train_pairs.reference))
        test_set = picture_features(model, config.test_data, set(test_pairs.reference))
        texts, text_row = text_features(model, [*train_pairs.change, *test_pairs.change])
        train_queries = as_queries(train_pairs, train_set, text_row, config.pairs)
        test_queries = as_queries(test_pairs, test_set, text_row, config.test_pairs)
        groups = group_numbers(train_set, config.within)

        queries = plain_queries(test_queries, test_set.bank, texts)
        costs: dict[str, dict[str, int | float]] = {}
        for name, head in tqdm(heads.items(), desc="fusion heads", disable=None):
            started = time.perf_counter()
            train_head(
                head,
                train_queries,
                pictures=train_set.bank,
                texts=texts,
                candidates=train_set.embeddings,
                groups=groups,
                steps=config.steps,
                batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                temperature=config.temperature,
                seed=config.seed,
            )
            trained = time.perf_counter()
            queries[name] = fuse_all(head, test_queries, pictures=test_set.bank, texts=texts)
            costs[name] = {
                "parameters": sum(parameter.numel() for parameter in head.parameters()),
                "training seconds": trained - started,
                "milliseconds a query": 1000 * (time.perf_counter() - trained) / len(test_queries),
            }
            chosen = config.heads[name]
            place = config.out / "heads" / name
            save_head(head, place, name=chosen.name, options=chosen.options, towers=towers)
        reports = measure(queries, test_pairs, test_queries, test_set, searcher)
        gains = {name: compare(reports[name], reports["sum"]) for name in heads}
        comparison = Comparison(reports, gains, costs, test_pairs)
        run_folder.write_json(config.out / "results.json", as_json(comparison, towers))
    return comparison


def build_head(config: HeadConfig, model: DualEncoder, seed: int) -> FusionHead:
    """A head for this model, before training.

    Raises:
        ConfigError: the head does not take an option.
    """
    torch.manual_seed(seed)
    widths = {
        "dim": model.config.dim,
        "image_width": model.image.token_width,
        "text_width": model.text.token_width,
    }
    try:
        return fusion_head(config.name)(**widths, **config.options)
    except TypeError as error:
        raise ConfigError(f"heads: {config.name} does not take these options: {error}") from error


def check_heads(config: FuseConfig) -> None:
    """See whether every head is known and takes its options, before anything is trained.

    Raises:
        ConfigError: one does not.
    """
    for title, head in config.heads.items():
        try:
            signature(fusion_head(head.name)).bind(
                dim=1, image_width=1, text_width=1, **head.options
            )
        except TypeError as error:
            raise ConfigError(f"heads.{title}: {head.name}: {error}") from error


def open_matching_index(config: FuseConfig, towers: str) -> Searcher:
    """The index of the test pictures, if it belongs to the model and to the data."""
    searcher = Searcher(config.index)
    card = searcher.card
    if card.fingerprints["model"] != towers:
        raise ConfigError(f"index: {config.index} was not made with {config.model}")
    if card.sources[0].data != Manifest.open(config.test_data).fingerprint:
        raise ConfigError(f"index: {config.index} was not made from {config.test_data}")
    return searcher


@torch.no_grad()
def picture_features(model: DualEncoder, data: str, asked: Collection[str]) -> PictureSet:
    """Embeddings of all pictures of a data set; tokens, in half precision, of those asked with."""
    model.eval()
    embeddings, pooled, tokens, mask = [], [], [], []
    keys: list[str] = []
    bank_keys: list[str] = []
    fields: list[dict[str, Any]] = []
    ids = []
    size, crop = model.config.image_size, FITS[model.config.fit]
    for batch in iterate(data, batch_size=256, image_size=size, crop=crop):
        features = model.image_features(batch.images)
        embedded = model.project_image(features.pooled)
        rows = [row for row, key in enumerate(batch.keys) if key in asked]
        embeddings.append(embedded)
        pooled.append(embedded[rows])
        tokens.append(features.tokens[rows].half())
        mask.append(features.mask[rows])
        bank_keys += [batch.keys[row] for row in rows]
        keys += batch.keys
        fields += batch.fields
        ids.append(batch.ids.numpy())
    return PictureSet(
        embeddings=torch.cat(embeddings),
        bank=FeatureBank(torch.cat(pooled), torch.cat(tokens), torch.cat(mask)),
        rows={key: row for row, key in enumerate(keys)},
        bank_rows={key: row for row, key in enumerate(bank_keys)},
        ids=np.concatenate(ids),
        fields=fields,
    )


@torch.no_grad()
def text_features(model: DualEncoder, texts: Sequence[str]) -> tuple[FeatureBank, dict[str, int]]:
    """Features of the distinct texts, and the row of each."""
    distinct = sorted(set(texts))
    tokens = model.tokenize(distinct)
    features = model.text_features(tokens.ids, tokens.mask)
    bank = FeatureBank(model.project_text(features.pooled), features.tokens.half(), features.mask)
    return bank, {text: row for row, text in enumerate(distinct)}


def as_queries(
    pairs: Pairs, pictures: PictureSet, text_row: Mapping[str, int], origin: Path
) -> ComposedQueries:
    """Pairs by the rows of their features.

    Raises:
        ConfigError: a pair names a picture that the data does not hold.
    """
    for key in (*pairs.reference, *pairs.target):
        if key not in pictures.rows:
            raise ConfigError(f"pairs: {origin} names {key!r}, which the data does not hold")
    return ComposedQueries(
        picture=torch.tensor([pictures.bank_rows[key] for key in pairs.reference]),
        text=torch.tensor([text_row[change] for change in pairs.change]),
        reference=torch.tensor([pictures.rows[key] for key in pairs.reference]),
        target=torch.tensor([pictures.rows[key] for key in pairs.target]),
    )


def group_numbers(pictures: PictureSet, field: str | None) -> torch.Tensor:
    """A number for each value of a field; all pictures are one group without a field."""
    if field is None:
        return torch.zeros(len(pictures.ids), dtype=torch.long)
    values = [str(fields.get(field)) for fields in pictures.fields]
    _, numbers = np.unique(np.array(values), return_inverse=True)
    return torch.from_numpy(numbers.astype(np.int64))


def plain_queries(
    queries: ComposedQueries, pictures: FeatureBank, texts: FeatureBank
) -> dict[str, torch.Tensor]:
    """What needs no head: either modality alone, and the sum of both."""
    image, text = pictures.pooled[queries.picture], texts.pooled[queries.text]
    return {
        "image only": image,
        "text only": text,
        "sum": F.normalize(image + text, dim=-1),
    }


def measure(
    embedded: Mapping[str, torch.Tensor],
    pairs: Pairs,
    queries: ComposedQueries,
    pictures: PictureSet,
    searcher: Searcher,
) -> dict[str, Report]:
    """Composed retrieval for each kind of query, on the same queries."""
    _, base = np.unique(np.array(pairs.base), return_inverse=True)
    targets = [[int(pictures.ids[row])] for row in queries.target]
    references = [[int(pictures.ids[row])] for row in queries.reference]
    return {
        name: composed_retrieval(
            vectors.numpy(),
            targets,
            searcher,
            references=references,
            groups=base.astype(np.int64),
            title=name,
            protocol={"bases": len(set(pairs.base))},
        )
        for name, vectors in embedded.items()
    }


def as_json(comparison: Comparison, towers: str) -> dict[str, Any]:
    """The comparison as JSON values."""
    return {
        "towers": towers,
        "best": comparison.best,
        "reports": [report.to_json() for report in comparison.reports.values()],
        "gains_over_sum": [report.to_json() for report in comparison.gains.values()],
        "costs": comparison.costs,
    }


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("fuse")
