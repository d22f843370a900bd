"""`align demo`: the whole path on the built-in data, from pictures on disk to a page.

A demo that was stopped goes on where it was; one that is done says so. Every stage is a verb of its
own: the folder of each holds the `config.yaml` it would take.
"""

import json
import resource
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from align.bundle import load
from align.folders import whole_folder
from eval.results import Report, format_table
from pipelines import embed, fuse, index, pretrain, run_folder
from pipelines.config import ConfigError, read_yaml
from pipelines.demo_page import DemoRun, write_page
from pipelines.evaluate import Evaluation, evaluate
from pipelines.heads import HEADS
from pipelines.schemas import DemoConfig, EmbedConfig
from shards import demo as data
from shards.catalog import MANIFEST_FILE
from shards.demo.edits import ComposedPair, composed_pairs, split_by_base
from shards.packing import pack

HELD_OUT_BASES = 0.5
"""Share of the base concepts whose composed queries are kept for the test."""
QUERIES_PER_BASE = 24
"""Composed test queries of one base at most, or couples with four skin tones would be most."""
_SHARD = 1000


def run(config: DemoConfig) -> int:
    """Run every stage that is not done, then print the figures and where the page is."""
    with run_folder.locked(config.out):
        if config.restart:
            _clear(config.out)
        _refuse_another(config)
        fuse.check_heads(config.fuse)
        if (config.out / "results.json").exists():
            _announce(config.out, "done before; add --restart to run it anew")
            return 0
        run_folder.record(config.out, config)
        code = _run_stages(config)
    if code == 0:
        _announce(config.out, "")
    return code


def _run_stages(config: DemoConfig) -> int:
    out = config.out
    clock = _Clock(out / "seconds.json")
    with clock.stage("pack"):
        for split in data.SPLITS:
            _pack(split, out / "shards" / split)
    with clock.stage("pretrain"):
        if not (out / "bundle").exists():
            started = config.pretrain.model_copy(update={"resume": True})
            code = pretrain.run(started)
            if code or not (out / "bundle").exists():  # it was stopped
                return code
    with clock.stage("embed"):
        embed.run(
            EmbedConfig(
                model=str(out / "bundle"),
                data=str(out / "shards" / "vendor"),
                out=out / "table",
                precision="fp32",  # figures do not depend on the machine's kind
            )
        )
    with clock.stage("index"):
        index.run(config.index)
    with clock.stage("evaluate"):
        evaluations = evaluate(load(out / "bundle"), config.evaluate)
    with clock.stage("fuse"):
        _write_pairs(out)
        comparison = fuse.compare_heads(load(out / "bundle"), config.fuse)
        _add_heads(out / "fuse" / HEADS, out / "bundle" / HEADS)
    with clock.stage("report"):
        finished = DemoRun(config, evaluations, comparison, clock.seconds)
        write_page(finished, out / "report.html")
    run_folder.write_json(
        out / "results.json",
        {
            "figures": figures_of(evaluations, comparison),
            "best_head": comparison.best,
            "seconds": {name: round(value, 1) for name, value in clock.seconds.items()},
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "reports": [one.report.to_json() for one in evaluations.values()]
            + [report.to_json() for report in comparison.reports.values()]
            + [report.to_json() for report in comparison.gains.values()],
        },
    )
    return 0


class _Clock:
    """Says which stage is on, and how long each took, over all attempts at this demo."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = run_folder.read_json(path) if path.exists() else {}

    def stage(self, name: str) -> "_Clock":
        print(f"[{name}]", flush=True)
        self._name = name
        return self

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        taken = time.perf_counter() - self._started
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + taken
        run_folder.write_json(self._path, self.seconds)


def _clear(out: Path) -> None:
    """Remove what a demo writes, and nothing else."""
    for name in ("shards", "pretrain", "bundle", "table", "index", "evaluate", "pairs", "fuse"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (
        ".table.lock",
        ".index.lock",
        "results.json",
        "report.html",
        "config.yaml",
        "environment.json",
        "seconds.json",
    ):
        (out / name).unlink(missing_ok=True)


def _refuse_another(config: DemoConfig) -> None:
    """A folder holds one demo; another configuration needs another folder or a restart."""
    earlier = config.out / "config.yaml"
    if not earlier.exists():
        return
    before, now = read_yaml(earlier), config.model_dump(mode="json")
    changed = [key for key, value in now.items() if key != "restart" and before.get(key) != value]
    if changed:
        raise ConfigError(
            f"{config.out}: holds a demo with another configuration ({', '.join(changed)}); "
            "choose another out, or add --restart to throw it away"
        )


def _pack(split: str, out: Path) -> None:
    if (out / MANIFEST_FILE).exists():
        return
    manifest = pack(data.SPLITS[split].records(), out, samples_per_shard=_SHARD, shuffle_seed=0)
    print(f"{out}: {len(manifest)} samples, {data.SPLITS[split].description}")


def _add_heads(trained: Path, place: Path) -> None:
    """Put the trained heads into the bundle, where search and the server find them by name."""
    with whole_folder(place) as beside:
        for head in sorted(trained.iterdir()):
            shutil.copytree(head, beside / head.name)


def _write_pairs(out: Path) -> None:
    """Composed queries: to train on from the artists trained on, to test on from the other."""
    train, _ = split_by_base(_pairs_of("train"), share=HELD_OUT_BASES)
    _, test = split_by_base(_pairs_of("vendor"), share=HELD_OUT_BASES)
    for name, pairs in {"train": train, "test": at_most(test, QUERIES_PER_BASE)}.items():
        target = out / "pairs" / f"{name}.parquet"
        target.parent.mkdir(exist_ok=True)
        parquet.write_table(pa.Table.from_pylist([asdict(pair) for pair in pairs]), target)


def _pairs_of(split: str) -> list[ComposedPair]:
    """All composed queries of a split, each within one artist.

    Some artists draw several concepts alike, to the byte; no change in words tells those apart.
    """
    names: dict[str, dict[str, str]] = defaultdict(dict)
    drawn: Counter[tuple[str, bytes]] = Counter()
    records = list(data.SPLITS[split].records())
    for record in records:
        drawn[record.fields["vendor"], record.image] += 1
    for record in records:
        vendor = record.fields["vendor"]
        if drawn[vendor, record.image] == 1:
            names[vendor][record.key] = record.caption or ""
    return [pair for _, one in sorted(names.items()) for pair in composed_pairs(one)]


def at_most(pairs: Iterable[ComposedPair], count: int) -> list[ComposedPair]:
    """At most so many pairs of each base, chosen by a hash, in their order."""
    by_base: dict[str, list[ComposedPair]] = defaultdict(list)
    for pair in pairs:
        by_base[pair.base].append(pair)
    kept = {
        pair
        for members in by_base.values()
        for pair in sorted(members, key=lambda one: sha256(repr(one).encode()).digest())[:count]
    }
    return [pair for members in by_base.values() for pair in members if pair in kept]


def figures_of(
    evaluations: Mapping[str, Evaluation], comparison: fuse.Comparison
) -> dict[str, dict[str, Any]]:
    """Every figure by name, with its interval."""
    reports = [one.report for one in evaluations.values()]
    reports += [replace(one, title=f"composed, {name}") for name, one in comparison.reports.items()]
    reports += [replace(one, title=f"composed, {one.title}") for one in comparison.gains.values()]
    return {
        f"{report.title}: {figure.name}": {
            "value": figure.value,
            "low": figure.low,
            "high": figure.high,
            "count": figure.count,
            "chance": figure.chance,
            "unit": figure.unit,
        }
        for report in reports
        for figure in report.figures
    }


def _announce(out: Path, note: str) -> None:
    """Print the table that the page shows, and where the page is."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    print(format_table(Report.from_json(report) for report in results["reports"]))
    seconds = sum(results["seconds"].values())
    print(
        f"\n{seconds:.0f} s, {results['peak_memory_mb']} MB at most" + (f"; {note}" if note else "")
    )
    print(f"figures  {out / 'results.json'}")
    print(f"model    {out / 'bundle'}")
    print(f"page     {(out / 'report.html').resolve()}")
    print(f"search   align serve {out / 'index'}")


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("demo")
