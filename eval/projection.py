"""Embeddings on paper: two coordinates per row, near where the rows are alike."""

import numpy as np
from jaxtyping import Float, Shaped
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

_COMPONENTS = 32
_FEWEST_FOR_TSNE = 20


def project_2d(
    embeddings: Shaped[np.ndarray, "rows dim"], *, perplexity: float = 25.0, seed: int = 0
) -> Float[np.ndarray, "rows 2"]:
    """Coordinates for a map: rows to unit length, PCA to 32 components, then t-SNE.

    t-SNE (van der Maaten and Hinton, 2008) keeps neighbourhoods, not distances: clusters mean
    something, their spacing does not. Below 20 rows the first two principal components are taken
    instead. One thread, a fixed seed and a start from PCA make the result repeatable.

    Raises:
        ValueError: fewer than two rows, or embeddings that are not finite.
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    if len(rows) < 2:
        raise ValueError(f"projection: {len(rows)} rows; at least 2 are needed")
    if not np.isfinite(rows).all():
        raise ValueError("projection: embeddings that are not finite")
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    with threadpool_limits(limits=1):
        count = min(_COMPONENTS, *rows.shape)
        components = PCA(count, svd_solver="full").fit_transform(rows)
        # Its sign is arbitrary, and a mirrored map is another map to its reader.
        largest = components[np.abs(components).argmax(axis=0), np.arange(count)]
        components = components * np.where(largest < 0, -1.0, 1.0)
        if len(rows) < _FEWEST_FOR_TSNE or count < 2:
            flat = np.zeros((len(rows), 2))
            flat[:, : min(2, count)] = components[:, :2]
            return flat
        tsne = TSNE(
            2,
            perplexity=min(perplexity, (len(rows) - 1) / 3),
            init=components[:, :2] / np.maximum(components[:, 0].std(), 1e-12) * 1e-4,
            max_iter=500,
            random_state=seed,
            n_jobs=1,
        )
        return tsne.fit_transform(components).astype(np.float64)
