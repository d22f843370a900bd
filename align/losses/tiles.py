"""Sums over all pairs of a batch, tile by tile: no matrix of all pairs ever exists.

A loss of all pairs needs three things of them, and all three are here: the similarities, one tile
after another in a buffer that is used again (`Tiles`); the pairs that are right for each other, as
classes and not as a matrix (`Positives`); and the gradients that weights of the pairs add up to
(`Gradients`).
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from align.gather import gather_labels, world_size

# Two tiles of 512 x 512 in fp32 stay in the second-level cache of a core, so that all that is done
# to a tile between two matrix products is cheap. A GPU would rather have few and large kernels.
_EDGE = {"cpu": 512}
_EDGE_ELSEWHERE = 4096


def in_full_precision(
    image: Float[Tensor, "batch dim"], text: Float[Tensor, "batch dim"]
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
    """Both in fp32, or in fp64 where one of them is."""
    exact = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    return image.to(exact).contiguous(), text.to(exact).contiguous()


def refuse_second_derivative() -> None:
    """To be called in a backward pass of which no graph is kept.

    Raises:
        RuntimeError: it runs under `create_graph`.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the gradient of a tiled loss cannot be derived again: leave out create_graph"
        )


def spans(length: int, size: int) -> list[slice]:
    """Cut `length` into pieces of `size`, the last of which may be shorter."""
    return [slice(at, min(at + size, length)) for at in range(0, length, size)]


class Tiles:
    r"""The similarities $s_{ij} = e^t\, x_i \cdot y_j$, a tile at a time.

    Args:
        rows: $x$, contiguous.
        columns: $y$, contiguous.
        scale: $e^t$, a scalar.

    Attributes:
        row_spans: where the tiles' rows lie, from first to last.
        column_spans: likewise for columns.
    """

    def __init__(
        self,
        rows: Float[Tensor, "rows dim"],
        columns: Float[Tensor, "columns dim"],
        scale: Float[Tensor, ""],
    ) -> None:
        edge = _EDGE.get(rows.device.type, _EDGE_ELSEWHERE)
        self.rows, self.columns, self.scale = rows, columns, scale
        self.row_spans, self.column_spans = spans(len(rows), edge), spans(len(columns), edge)
        size = min(edge, len(rows)) * min(edge, len(columns))
        self._buffers = rows.new_empty(size), rows.new_empty(size)

    def beside(
        self, here: slice
    ) -> Iterator[tuple[slice, Float[Tensor, "some others"], Float[Tensor, "some others"]]]:
        """The tiles of some rows: which columns, their similarities, and room for as many numbers.

        Both tensors are the caller's to write to until the next tile is asked for.
        """
        scaled = self.rows[here] * self.scale
        for there in self.column_spans:
            shape = len(scaled), there.stop - there.start
            tile, room = (one[: shape[0] * shape[1]].view(shape) for one in self._buffers)
            torch.mm(scaled, self.columns[there].T, out=tile)
            yield there, tile, room


class Gradients:
    r"""Gradients of rows and columns, from weights $w_{ij}$ of the pairs, tile by tile.

    $\sum_j w_{ij}\, y_j$ for the rows and $\sum_i w_{ij}\, x_i$ for the columns: two matrix
    products a tile, each only where it is wanted. The rows' is there, too, where neither is wanted
    but the scale's.

    Attributes:
        of_rows: the sum as far as it has come, or None.
        of_columns: likewise.
    """

    def __init__(self, tiles: Tiles, *, rows: bool, columns: bool, scale: bool) -> None:
        self.tiles = tiles
        self.of_rows = torch.zeros_like(tiles.rows) if rows or (scale and not columns) else None
        self.of_columns = torch.zeros_like(tiles.columns) if columns else None

    def add(self, here: slice, there: slice, weights: Float[Tensor, "some others"]) -> None:
        """Take the weights of one tile into account."""
        if self.of_rows is not None:
            self.of_rows[here].addmm_(weights, self.tiles.columns[there])
        if self.of_columns is not None:
            self.of_columns[there].addmm_(weights.T, self.tiles.rows[here])

    def finish(self, factor: Float[Tensor, ""]) -> Float[Tensor, ""]:
        r"""Multiply the sums by `factor`; return as many times $\sum_{ij} w_{ij} x_i \cdot y_j$.

        That is the sum of the rows times their gradients, and costs no product of matrices.
        """
        tiles = self.tiles
        sides = [
            (self.of_rows, tiles.rows, tiles.row_spans),
            (self.of_columns, tiles.columns, tiles.column_spans),
        ]
        total = torch.zeros_like(factor)
        for gradient, vectors, where in reversed(sides):
            if gradient is not None:
                gradient.mul_(factor)
                total = torch.stack(
                    [(vectors[some] * gradient[some]).sum() for some in where]
                ).sum()
        return total


class Positives:
    """Which columns are right for which rows: a class for each, never a matrix.

    Sums over the right columns of a row are sums over a class, of which there are no more than
    columns. Without labels row i of this process is right for its own column only.

    Args:
        batch: number of rows, those of this process.
        labels: of these rows; None = row i for row i alone. Labels of all processes are gathered.

    Attributes:
        own: the columns that came with this process's rows.
    """

    def __init__(self, batch: int, labels: Int[Tensor, " batch"] | None) -> None:
        first = batch * dist.get_rank() if world_size() > 1 else 0
        self.batch = batch
        self.own = slice(first, first + batch)
        self._class: Tensor | None = None
        if labels is not None:
            _, self._class, self._counts = torch.unique(
                gather_labels(labels), return_inverse=True, return_counts=True
            )

    def pairs(self) -> Int[Tensor, ""] | int:
        """Number of right pairs in this process's rows."""
        if self._class is None:
            return self.batch
        return self._counts[self._class[self.own]].sum()

    def score(self, tiles: Tiles, *, mean: bool) -> Float[Tensor, ""]:
        r"""$\sum_{ij} t_{ij}\, s_{ij}$ over this process's rows.

        Args:
            tiles: whose rows and columns are meant.
            mean: whether $t_{ij}$ is one over the number of columns that are right for row i, or 1.
        """
        dots = [
            (tiles.rows[here] * self._sums_of_columns(tiles, here, sums)).sum()
            for sums in [self._class_sums(tiles.columns, slice(None), mean=mean)]
            for here in tiles.row_spans
        ]
        return tiles.scale * torch.stack(dots).sum()

    def subtract(self, gradients: Gradients, *, share: float, mean: bool) -> None:
        """Let `share` times $-t_{ij}$ be among the weights; see `score`."""
        tiles = gradients.tiles
        if gradients.of_rows is not None:
            sums = self._class_sums(tiles.columns, slice(None), mean=mean)
            for here in tiles.row_spans:
                gradients.of_rows[here].sub_(self._sums_of_columns(tiles, here, sums), alpha=share)
        if gradients.of_columns is None:
            return
        sums = self._class_sums(tiles.rows, self.own, mean=mean)
        if sums is None or self._class is None:
            gradients.of_columns[self.own].sub_(tiles.rows, alpha=share)
            return
        for there in tiles.column_spans:
            gradients.of_columns[there].sub_(sums[self._class[there]], alpha=share)

    def _class_sums(
        self, vectors: Float[Tensor, "some dim"], which: slice, *, mean: bool
    ) -> Float[Tensor, "classes dim"] | None:
        if self._class is None:
            return None
        sums = vectors.new_zeros(len(self._counts), vectors.shape[1])
        sums.index_add_(0, self._class[which], vectors)
        return sums.div_(self._counts[:, None]) if mean else sums

    def _sums_of_columns(
        self, tiles: Tiles, here: slice, sums: Float[Tensor, "classes dim"] | None
    ) -> Float[Tensor, "some dim"]:
        if sums is None or self._class is None:
            return tiles.columns[self.own][here]
        return sums[self._class[self.own][here]]
