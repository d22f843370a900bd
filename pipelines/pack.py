"""`align pack`: image-text pairs into WebDataset shards with a manifest."""

from pipelines.schemas import PackConfig
from shards.sources import FolderSource, ParquetSource
from shards.write import pack


def run(config: PackConfig) -> int:
    """Pack, then say what there is."""
    sources = config.source if isinstance(config.source, list) else [config.source]
    if len(sources) == 1 and sources[0].is_dir():
        records = FolderSource(sources[0])
    else:
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
    print(
        f"{config.out}: {len(manifest)} samples in {len(manifest.shards)} shards, "
        f"fingerprint {manifest.fingerprint[:12]}"
    )
    return 0


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("pack")
