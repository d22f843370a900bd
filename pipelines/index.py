"""`align index`: an embedding table into a FAISS index, and changes of one.

Many processes (`accelerate launch -m pipelines.index TABLE OUT factory=IVF4096,SQ8`) build it in
shares: the first trains, each adds its shares of the rows, the first merges.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from eval.index.build import Progress, build_index
from eval.index.card import IndexCard
from eval.index.change import append, compact, remove
from eval.index.describe import describe
from eval.index.folder import open_index
from eval.index.partial import build_share, is_mergeable, merged, prepared
from eval.index.peers import adopt, adopt_table, kind_of
from eval.search.filters import RowFilter
from eval.table import EmbeddingTable
from pipelines import run_folder
from pipelines.config import ConfigError
from pipelines.schemas import IndexConfig
from pipelines.together import ALONE, Share

_PATIENCE_S = 3600.0
"""When a condition is given up: the user's own is not a stranger's."""


def run(config: IndexConfig) -> int:
    """Do what was asked, and say what the index reaches."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return _run(config, ALONE)
    from pipelines.launched import ending_with_others, processes

    accelerator = processes()
    share = Share.of(accelerator)
    with ending_with_others(share):
        code = _run(config, share)
        accelerator.end_training()
    return code


def _run(config: IndexConfig, share: Share) -> int:
    if not share.alone and _is_for_many(config, share):
        _build_together(config, share)
        return 0
    if not share.is_main:
        return 0
    with run_folder.locked_beside(config.out), _bar() as progress:
        if config.export:
            lines = _exported(config)
        elif config.remove or config.remove_where or config.compact:
            lines = _changed(config, progress)
        elif config.append:
            card = append(config.out, _table(config), seed=config.seed, progress=progress)
            lines = describe(card)
        else:
            lines = describe(_built(config, progress))
    print("\n".join([f"{config.out}: {lines[0]}", *lines[1:]]))
    return 0


# --- building ---


def _built(config: IndexConfig, progress: Progress) -> IndexCard:
    kind = kind_of(config.table)
    if config.on_disk:
        if kind is not None:
            raise ConfigError(f"on_disk: {config.table} is by another tool; leave it out")
        return _in_shares(config, ALONE, progress)
    if config.embeddings is not None and kind != "index":
        raise ConfigError(f"embeddings: {config.table} is no index by other tools")
    if kind == "index":
        return _adopted(config, progress)
    table = _table(config)
    with _in_our_words():
        return _whole(config, table, progress)


@contextmanager
def _in_our_words() -> Iterator[None]:
    """An error of the library names the option as the user does."""
    try:
        yield
    except ValueError as error:
        if "max_bytes" not in str(error):
            raise
        raise ConfigError(str(error).replace("max_bytes", "max_memory")) from error


def _whole(config: IndexConfig, table: EmbeddingTable, progress: Progress) -> IndexCard:
    return build_index(
        table,
        config.out,
        factory=config.factory,
        knobs=config.knobs,
        modality=config.modality,
        queries=config.queries,
        target_recall=config.target_recall,
        max_bytes=config.max_memory,
        train_rows=config.train_rows,
        seed=config.seed,
        progress=progress,
    )


def _table(config: IndexConfig) -> EmbeddingTable:
    """The table; embeddings by other tools become one beside the index, of links to their files."""
    if kind_of(config.table) != "embeddings":
        if config.model is not None:
            raise ConfigError(f"model: {config.table} says itself which model it was made with")
        return EmbeddingTable(config.table)
    fingerprint, origin = _model(config)
    return adopt_table(
        config.table,
        config.out.with_name(config.out.name + ".table"),
        modality=config.modality,
        model_fingerprint=fingerprint,
        origin=origin,
    )


def _adopted(config: IndexConfig, progress: Progress) -> IndexCard:
    fingerprint, origin = _model(config)
    asked = "target_recall" in config.model_fields_set
    return adopt(
        config.table,
        config.out,
        modality=config.modality,
        embeddings=config.embeddings,
        model_fingerprint=fingerprint,
        origin=origin,
        queries=config.queries,
        target_recall=config.target_recall if asked else None,
        seed=config.seed,
        progress=progress,
    )


def _model(config: IndexConfig) -> tuple[str, dict[str, str]]:
    if config.model is None:
        return "", {}
    from pipelines.models import open_model  # slow to import, and seldom asked for

    opened = open_model(config.model)
    return opened.fingerprint, {"model": opened.place}


# --- in shares ---


def _is_for_many(config: IndexConfig, share: Share) -> bool:
    """Whether the processes build in shares; what cannot be, the first does alone."""
    if config.append or config.export or config.compact or config.remove or config.remove_where:
        return False
    if kind_of(config.table) is not None:
        raise ConfigError(
            f"table: {config.table} is by another tool, and one process takes it over; leave out "
            "accelerate launch"
        )
    if config.on_disk or config.factory == "auto":
        _refuse_memory(config)
        return True
    dim = EmbeddingTable(config.table, check="sizes").card.dim
    if is_mergeable(config.factory, dim):
        _refuse_memory(config)
        return True
    if share.is_main:
        print(
            f"note: an index of kind {config.factory} cannot be built in shares; one process "
            "builds it"
        )
    return False


def _refuse_memory(config: IndexConfig) -> None:
    if config.max_memory is not None:
        raise ConfigError(
            "max_memory: several processes build in shares, whose lists stay on disk, and memory "
            "is that of share_rows; leave it out, or let one process build"
        )


def _build_together(config: IndexConfig, share: Share) -> None:
    with _held_by_first(config.out, share), _bar(shown=share.is_main) as progress:
        card = _in_shares(config, share, progress)
    if share.is_main:
        lines = describe(card)
        print("\n".join([f"{config.out}: {lines[0]}", *lines[1:]]))


@contextmanager
def _held_by_first(out: Path, share: Share) -> Iterator[None]:
    """The first process holds the folder for all of them."""
    if not share.is_main:
        yield
        return
    with run_folder.locked_beside(out):
        yield


def _in_shares(config: IndexConfig, share: Share, progress: Progress) -> IndexCard:
    """Every process takes each so many-th share; those that a killed run left are kept."""
    check = "sha256" if share.is_main else "sizes"
    table = share.all_or_none(lambda: EmbeddingTable(config.table, check=check))
    plan = share.all_or_none(
        lambda: (
            prepared(
                table,
                config.out,
                factory=config.factory,
                modality=config.modality,
                train_rows=config.train_rows,
                seed=config.seed,
                share_rows=config.share_rows,
                processes=share.ranks,
                progress=progress,
            )
            if share.is_main
            else None
        )
    )
    plan = share.told(plan)[0]
    assert plan is not None

    def build_mine() -> None:
        mine = range(share.rank, len(plan.shares), share.ranks)
        for count, number in enumerate(mine, 1):
            build_share(table, config.out, plan, number)
            progress("shares", count, len(mine))

    share.all_or_none(build_mine)
    card = share.all_or_none(
        lambda: (
            merged(
                table,
                config.out,
                plan,
                knobs=config.knobs,
                queries=config.queries,
                target_recall=config.target_recall,
                progress=progress,
            )
            if share.is_main
            else None
        )
    )
    return share.told(card)[0]  # pyright: ignore[reportReturnType] - the first one's


# --- changing ---


def _changed(config: IndexConfig, progress: Progress) -> list[str]:
    """Remove, then compact, as asked."""
    card = IndexCard.load(config.out)
    before, unknown = card, 0
    if config.remove is not None:
        wanted = _ids(config.remove)
        rows = open_index(config.out, check="sizes", memory_map=True).rows
        unknown = len(set(wanted)) - len(rows.held(wanted))
        card = remove(config.out, wanted)
    elif config.remove_where is not None:
        card = remove(config.out, _where(config.out, config.remove_where))
    removed = card.removed - before.removed
    passed = [f"{unknown:,} ids that the index does not hold passed over"] * bool(unknown)
    if config.compact:
        card = compact(config.out, progress=progress)
        return [f"{before.rows - card.rows:,} removed rows taken out", *passed, *describe(card)]
    said = [*passed, *describe(card)]
    return [f"{removed:,} rows removed, {card.live:,} left; figures from before", *said]


def _ids(path: Path) -> list[int]:
    """The ids of a file: one a line; empty lines are passed over."""
    ids = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            ids.append(int(line))
        except ValueError as error:
            raise ConfigError(f"{path}: line {number} is no id: {line[:40]!r}") from error
    if not ids:
        raise ConfigError(f"{path}: holds no ids")
    return ids


def _where(folder: Path, condition: str) -> list[int]:
    """The ids of the rows that a condition holds of."""
    opened = open_index(folder, check="sizes", memory_map=True)
    finds = RowFilter(opened.rows, opened.removed, seconds=_PATIENCE_S)
    allowed = finds.allowed(condition)
    if allowed is None or not len(allowed.rows):
        raise ConfigError(f"remove_where: {condition} holds of no row; nothing removed")
    return opened.rows.ids[allowed.rows].tolist()


def _exported(config: IndexConfig) -> list[str]:
    from eval.index.export import EXPORTS  # engines are imported when one is asked for

    assert config.export is not None
    if config.export not in EXPORTS:
        raise ConfigError(f"export: unknown {config.export!r}; known: {', '.join(EXPORTS)}")
    return EXPORTS[config.export](config.table, config.out)


@contextmanager
def _bar(*, shown: bool = True) -> Iterator[Progress]:
    """A progress bar for each kind of work, one after the other; none where output is piped."""
    bars: dict[str, tqdm] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            for bar in bars.values():
                bar.close()
            bars[what] = tqdm(total=total, desc=what, disable=None if shown else True)
        bars[what].update(done - bars[what].n)

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("index")
