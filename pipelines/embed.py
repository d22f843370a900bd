"""`align embed`: shards through a model into an embedding table.

One process or many (`accelerate launch -m pipelines.embed CONFIG.yaml`), on machines that share a
file system: process `r` of `N` writes the missing parts `r, r + N, ...`. A part covers fixed
samples of the data set and its batches begin where it does, so that its bytes do not depend on who
writes it, nor on what was killed before.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from align.fusion.store import head_fingerprint, load_head
from eval.embed import EmbeddedRows, TableWriter
from eval.table import PartCard, read_parts
from pipelines import run_folder
from pipelines.launched import cores_each, ending_with_others, processes
from pipelines.models import OpenModel, open_model, whereabouts
from pipelines.pairs import left_out
from pipelines.part_reader import OptionalCaption, PartReader, Piece
from pipelines.progress import StopOnSignal, duration
from pipelines.row_encoder import STAGES, RowEncoder, precision_for
from pipelines.schemas import EmbedConfig
from pipelines.together import Share
from shards.batch import Batch
from shards.captions import CaptionRule
from shards.crop import FITS
from shards.damage import DamageTally, Problem, Reason
from shards.manifest import Manifest

T = TypeVar("T")

_MOST_WORKERS = 16
"""Decoding threads unless stated: each keeps a batch of pictures in memory."""
_SAY_EVERY_S = 10.0
_STOPPED = ".stopped"
"""A file in the table's folder by which a process that fails tells the others."""


def run(config: EmbedConfig) -> int:
    """Embed a data set into a table; one that was cut off is gone on with.

    Returns:
        0 when the table is whole, 130 after SIGINT or SIGTERM.
    """
    accelerator = processes()
    share = Share.of(accelerator)
    with ExitStack() as stack:
        stack.enter_context(ending_with_others(share))

        def lock() -> None:
            if share.is_main:
                stack.enter_context(run_folder.locked_beside(config.out))

        share.all_or_none(lock)
        code = _Embedding(config, share).run()
    accelerator.end_training()
    return code


class _Embedding:
    """One embedding, as one process sees it; all of its processes make it at once."""

    def __init__(self, config: EmbedConfig, share: Share) -> None:
        self.config, self.share = config, share
        self.manifest = self._main_first(lambda: Manifest.open(config.data))
        share.refuse_different_data({config.data: self.manifest.fingerprint})
        opened = share.all_or_none(lambda: open_model(config.model))
        self.encoder = share.all_or_none(lambda: _encoder(config, opened, share))
        self.writer: TableWriter = self._main_first(lambda: self._begin(opened))
        self.reader = PartReader(
            self.manifest,
            rows_per_part=config.rows_per_part,
            batch_size=config.batch_size,
            image_size=opened.model.config.image_size,
            crop=FITS[opened.model.config.fit],
            captions=_captions(config),
            workers=min(_MOST_WORKERS, cores_each()) if config.workers is None else config.workers,
        )
        self.names = np.array([shard.name for shard in self.manifest.shards])
        self.stopped = config.out / _STOPPED

    def run(self) -> int:
        """Write the missing parts, then the table's card; the exit code."""
        share, done = self.share, self.writer.done
        done.update(share.told(done)[0])  # directories of a network may be seen late
        missing = share.told([n for n in range(self.reader.parts) if n not in done])[0]
        whole = share.told(sorted(done))[0]
        share.all_or_none(lambda: self.writer.verify(whole[share.rank :: share.ranks]))
        if done and missing and share.is_main:
            print(f"{self.config.out}: going on; {self._so_far()}", flush=True)
        started = time.perf_counter()
        samples = 0
        if missing:
            with StopOnSignal(together=not share.alone) as stop:
                parts = missing[share.rank :: share.ranks]
                samples = share.all_or_none(lambda: self._embed(parts, stop))
                asked = any(share.told(stop.asked))
            if asked:
                if share.is_main:
                    said = f"stopped; {self._so_far()}, and the same command goes on"
                    print(f"{self.config.out}: {said}", flush=True)
                return 130
        mine = set(missing[share.rank :: share.ranks])
        for cards in share.told({n: card for n, card in done.items() if n in mine}):
            done.update(cards)
        rate = sum(share.told(samples)) / (time.perf_counter() - started)
        share.all_or_none(lambda: self._finish(rate if missing else None))
        return 0

    def _so_far(self) -> str:
        cards = read_parts(self.config.out).values()
        parts = "a whole part" if len(cards) == 1 else f"{len(cards):,} whole parts"
        return f"{sum(card.rows for card in cards):,} rows are in {parts}"

    def _main_first(self, work: Callable[[], T]) -> T:
        """What all processes make, the main one before the others: what it writes, they read."""
        share = self.share
        first = share.all_or_none(lambda: work() if share.is_main else None)
        return share.all_or_none(lambda: work() if first is None else first)

    def _begin(self, opened: OpenModel) -> TableWriter:
        config = self.config
        prints = {"model": opened.fingerprint, "data": self.manifest.fingerprint}
        origin: dict[str, Any] = {"model": opened.place, "data": whereabouts(config.data)}
        if "fused" in config.rows:
            head = config.head
            prints["head"] = head_fingerprint(head) if head else "unit-length mean"
            origin["head"] = str(head.resolve()) if head else None
        writer = TableWriter(
            config.out,
            modalities=config.rows,
            dim=opened.model.config.dim,
            fingerprints=prints,
            dtype=config.dtype,
            rows_per_part=config.rows_per_part,
            options={
                "caption_fields": config.caption_fields,
                "fields": config.fields,
                "precision": self.encoder.precision,
            },
            origin=origin,
        )
        if self.share.is_main:
            (config.out / _STOPPED).unlink(missing_ok=True)
        return writer

    def _embed(self, parts: Sequence[int], stop: StopOnSignal) -> int:
        """Write these parts, as far as nobody asks to stop; how many samples were seen."""
        try:
            return self._write(parts, stop)
        except Exception:
            if not self.share.alone:
                self.stopped.touch()
            raise

    def _write(self, parts: Sequence[int], stop: StopOnSignal) -> int:
        tally = self._tally(self.writer.done.values())
        rows: list[EmbeddedRows] = []
        made, seen = _Made(), 0
        total = sum(len(self.reader.samples(part)) for part in parts)
        with (
            self.reader.pieces(parts) as pieces,
            self.encoder.ready(),
            _Progress(total, self.share) as progress,
        ):
            for piece, seconds in _waited(pieces):
                if stop.asked or (not self.share.alone and self.stopped.exists()):
                    break
                tally.add(piece.samples, piece.problems)
                made.read(piece, seconds)
                if piece.batch is not None:
                    rows.append(self._rows(piece.batch))
                if piece.last:
                    made.encoded(self.encoder)
                    self.writer.write(piece.part, rows, made.facts)
                    rows, made = [], _Made()
                seen += piece.samples
                progress.add(piece.samples)
        return seen

    def _rows(self, batch: Batch) -> EmbeddedRows:
        ids = batch.ids.numpy()
        wanted = self.config.fields
        return EmbeddedRows(
            ids=ids,
            keys=batch.keys,
            captions=[caption or None for caption in batch.captions],
            shards=self.names[self.manifest.shard_numbers[ids]].tolist(),
            embeddings=self.encoder.encode(batch),
            fields=batch.fields if wanted is None else [_kept(one, wanted) for one in batch.fields],
        )

    def _tally(self, cards: Iterable[PartCard]) -> DamageTally:
        """What is known of bad samples; too many of them end the run.

        Raises:
            TooMuchDamageError: there are.
        """
        config, manifest = self.config, self.manifest
        tally = DamageTally(len(manifest), config.max_bad_fraction, config.strict)
        sizes = {shard.name: shard.samples for shard in manifest.shards}
        tally.judge_scan(manifest.damage, sizes)
        for card in cards:
            bad = card.facts["bad"]
            problems = [Problem(**{**one, "reason": Reason(one["reason"])}) for one in bad]
            tally.add(card.facts["seen"], problems)
        return tally

    def _finish(self, rate: float | None) -> None:
        """Judge the whole, write the report and the table's card, and say what there is."""
        if not self.share.is_main:
            return
        out, done = self.config.out, self.writer.done
        cards = [done[number] for number in range(self.reader.parts)]
        tally = self._tally(cards)
        facts = [card.facts for card in cards]
        seconds = {stage: sum(one["seconds"][stage] for one in facts) for stage in STAGES}
        cut = sum(one["cut"] for one in facts)
        if rate is not None or not self.writer.card.complete:
            report = {
                "data": self.manifest.place,
                "fingerprint": self.manifest.fingerprint,
                **tally.report(),
                "left_out": [problem.as_dict() for problem in self.manifest.problems],
                "cut_captions": cut,
                "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()},
            }
            run_folder.write_json(out / "data_report.json", report)
            self.writer.finish()
        card = self.writer.card
        said = [f"{card.rows} rows of {card.dim} ({', '.join(card.modalities)})"]
        if tally.bad:
            said.append(f"{tally.bad} bad samples left out (data_report.json)")
        if cut:
            said.append(f"{cut} captions cut at {self.encoder.model.config.context_length} tokens")
        if rate is not None:
            said.append(f"{rate:.1f} samples/s")
        whole = max(sum(seconds.values()), 1e-9)
        budget = ", ".join(f"{name} {seconds[k] / whole:.0%}" for k, name in STAGES.items())
        print(f"{out}: {', '.join(said)}; time: {budget}{left_out(self.manifest)}", flush=True)
        for note in self.writer.notes:
            print(f"{out}: {note}", flush=True)


@dataclass
class _Made:
    """What the card of a part says beside its rows.

    Attributes:
        seen: samples, good and bad.
        bad: the bad ones.
        cut: captions longer than the context.
        seconds: by stage.
    """

    seen: int = 0
    bad: list[dict[str, str]] = field(default_factory=list)
    cut: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def read(self, piece: Piece, seconds: float) -> None:
        """Take in a piece that was waited for."""
        self.seen += piece.samples
        self.bad += [problem.as_dict() for problem in piece.problems]
        self.seconds["read"] += seconds

    def encoded(self, encoder: RowEncoder) -> None:
        """Take over what an encoder counted; writing begins."""
        self.cut, encoder.cut = encoder.cut, 0
        for stage, spent in encoder.seconds.items():
            self.seconds[stage] += spent
        encoder.seconds.clear()
        self._writing = time.perf_counter()

    def facts(self) -> dict[str, Any]:
        """As JSON values, once the files of the part are written."""
        self.seconds["write"] = time.perf_counter() - self._writing
        seconds = {stage: round(spent, 4) for stage, spent in self.seconds.items()}
        return {"seen": self.seen, "bad": self.bad, "cut": self.cut, "seconds": seconds}


class _Progress:
    """A bar with rate and time left; plain lines where the output is piped."""

    def __init__(self, total: int, share: Share) -> None:
        self._of = "" if share.alone else f" (process {share.rank} of {share.ranks})"
        self._total, self._done = total, 0
        self._is_told = share.is_main
        self._started = self._said = time.perf_counter()

    def __enter__(self) -> "_Progress":
        self._bar = tqdm(
            total=self._total,
            unit="samples",
            desc=f"embed{self._of}",
            disable=None if self._is_told else True,
            dynamic_ncols=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, samples: int) -> None:
        """So many samples more are done."""
        self._bar.update(samples)
        self._done += samples
        now = time.perf_counter()
        if not self._is_told or not self._bar.disable or now - self._said < _SAY_EVERY_S:
            return
        self._said = now
        rate = self._done / (now - self._started)
        left = duration((self._total - self._done) / rate)
        print(
            f"{self._done:,} of {self._total:,} samples{self._of}, {rate:.1f} samples/s, about "
            f"{left} to go",
            flush=True,
        )


def _waited(pieces: Iterator[Piece]) -> Iterator[tuple[Piece, float]]:
    """Each piece, and how long it had to be waited for."""
    while True:
        started = time.perf_counter()
        piece = next(pieces, None)
        if piece is None:
            return
        yield piece, time.perf_counter() - started


def _encoder(config: EmbedConfig, opened: OpenModel, share: Share) -> RowEncoder:
    head = load_head(config.head, towers=opened.fingerprint) if config.head else None
    precision = precision_for(config.precision, share.device)
    return RowEncoder(
        opened.model, config.rows, head=head, device=share.device, precision=precision
    )


def _captions(config: EmbedConfig) -> CaptionRule:
    """Pictures alone need no caption."""
    kind = OptionalCaption if config.rows == ["image"] else CaptionRule
    return kind(tuple(config.caption_fields))


def _kept(fields: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """The wanted fields of a sample; dots lead into objects."""
    kept = {}
    for name in wanted:
        value: Any = fields
        for key in [name] if name in fields else name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            kept[name] = value
    return kept


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("embed")
