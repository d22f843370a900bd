"""`align pack`: image-text pairs into WebDataset shards with a manifest."""

from pipelines.config import ConfigError
from pipelines.schemas import PackConfig
from shards.sources import FolderSource, ParquetSource
from shards.write import pack


def run(config: PackConfig) -> int:
    """Pack, then say what there is."""
    sources = config.source if isinstance(config.source, list) else [config.source]
    if len(sources) == 1 and sources[0].is_dir():
        records = FolderSource(sources[0])
    else:
        for source in sources:
            if source.suffix not in {".parquet", ".pq"}:
                raise ConfigError(
                    f"source: {source} is neither a folder of pictures (with .txt or .json beside "
                    "them) nor a Parquet file with image bytes"
                )
        records = ParquetSource(
            sources,
            image=config.image,
            caption=config.caption,
            key=config.key,
            where=config.where,
        )
    manifest = pack(
        records,
        config.out,
        samples_per_shard=config.samples_per_shard,
        shuffle_seed=config.shuffle_seed,
        strict=config.strict,
        overwrite=config.overwrite,
    )
    for problem in manifest.problems[:10]:
        print(f"left out: {problem}")
    if len(manifest.problems) > 10:
        print(f"left out: {len(manifest.problems) - 10} more, listed in {config.out}/manifest.json")
    shards = f"{len(manifest.shards)} shard" + ("s" if len(manifest.shards) != 1 else "")
    left_out = f", {len(manifest.problems)} left out" if manifest.problems else ""
    print(
        f"{config.out}: {len(manifest)} samples in {shards}{left_out}, "
        f"fingerprint {manifest.fingerprint[:12]}"
    )
    return 0


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("pack")
