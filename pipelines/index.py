"""`align index`: an embedding table into a FAISS index."""

from eval.index.build import build_index
from eval.index.card import IndexCard
from eval.table import EmbeddingTable
from pipelines import run_folder
from pipelines.schemas import IndexConfig


def run(config: IndexConfig) -> int:
    """Build the index and say what it reaches."""
    with run_folder.locked_beside(config.out):
        card = build_index(
            EmbeddingTable(config.table),
            config.out,
            factory=config.factory,
            knobs=config.knobs,
            modality=config.modality,
            seed=config.seed,
        )
    print(f"{config.out}: {describe(card)}")
    return 0


def describe(card: IndexCard) -> str:
    """An index in one line."""
    first = card.reached[0]
    recall = first.at_10
    return (
        f"{card.factory}, {card.rows} {card.modality} rows of {card.dim}, "
        f"{card.bytes_per_vector:.0f} bytes each, built in {card.build_seconds:.1f} s, "
        f"recall@10 of {first.queries} queries against exact search "
        f"{100 * recall.value:.1f} % ({100 * recall.low:.1f} to {100 * recall.high:.1f})"
    )


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("index")
