"""What learns, from which weights and how fast: a configuration as rules, and the run's tale."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING

from align.encoders.tower import ImageTower, TextTower
from align.model import DualEncoder
from align.parameters import Learning, Rule, falling, locked, named
from pipelines.config import ConfigError
from pipelines.schemas import PretrainConfig
from pipelines.schemas.training import ImageTowerConfig, TextTowerConfig


def learning_rules(config: PretrainConfig, model: DualEncoder) -> list[Rule]:
    """The rules of a run: rates that fall by layer, then locked towers, then the user's own.

    Raises:
        ConfigError: a tower has fewer groups of layers than are to be trainable.
    """
    rules = []
    for side, wanted, tower in _sides(config, model):
        if wanted.layer_decay != 1:
            rules += falling(side, tower, factor=wanted.layer_decay)
        if wanted.trainable is not None:
            try:
                rules += locked(side, tower, trainable=wanted.trainable)
            except ValueError as error:
                raise ConfigError(f"model.{side}.trainable: {error}") from error
    return rules + [
        Rule(rule.match, rate=rule.rate, weight_decay=rule.weight_decay)
        for rule in config.optimizer.rules
    ]


def _sides(
    config: PretrainConfig, model: DualEncoder
) -> Iterator[tuple[str, ImageTowerConfig | TextTowerConfig, ImageTower | TextTower]]:
    yield "image", config.model.image, model.image
    yield "text", config.model.text, model.text


def origins(config: PretrainConfig, model: DualEncoder) -> list[str]:
    """Where the weights of each tower come from, in a line."""
    lines = []
    for side, wanted, tower in _sides(config, model):
        line = f"{side}: {tower.name}, "
        if source := _source(wanted.name, wanted.options):
            line += source
            if wanted.projection != "none":
                line += "; its projection begins anew"
        else:
            line += "fresh weights"
            if place := _place(wanted.name, wanted.options):
                line += f" (model.{side}.options.pretrained=true takes those of {place})"
        lines.append(line)
    return lines


def locked_at_random(
    config: PretrainConfig, model: DualEncoder, learning: Mapping[str, Learning]
) -> list[str]:
    """A note for each tower of which something is locked that never got weights.

    Gains and biases do not count: they begin at one and zero, where a layer does its work.

    Args:
        config: of the run.
        model: what `learning` tells of, before anything of it is frozen: what an architecture
            holds fixed by itself is not meant.
        learning: from `how_it_learns`.
    """
    notes = []
    for side, wanted, tower in _sides(config, model):
        if _source(wanted.name, wanted.options):
            continue
        sizes = {
            f"{side}.{name}": one.numel()
            for name, one in tower.named_parameters()
            if one.requires_grad and learning[f"{side}.{name}"].kind != "gain"
        }
        still = sum(size for name, size in sizes.items() if learning[name].rate == 0)
        if not still:
            continue
        what = f"the {side} tower is locked at random weights"
        if still < sum(sizes.values()):
            share = f"{_count(still)} of {_count(sum(sizes.values()))}"
            what = f"{share} weights of the {side} tower are locked as they were drawn at random"
        notes.append(f"note: {what}: {_remedy(side, wanted.name, wanted.options)}")
    return notes


def _source(name: str, options: Mapping[str, Any]) -> str | None:
    """Which weights a tower gets; None = it is drawn at random."""
    library = name.partition(":")[0]
    pretrained = options.get("pretrained", library == "local")
    if not pretrained:
        return None
    if isinstance(pretrained, str):  # a tag of OpenCLIP's, or a file
        return f"weights from {pretrained}"
    place = _place(name, options)
    return f"weights from {place}" if place else "published weights"


def _place(name: str, options: Mapping[str, Any]) -> str | None:
    """The folder or hub id that a tower's name names; None for an architecture."""
    library, _, rest = name.partition(":")
    kind, _, place = rest.partition(":")
    if place and kind in ("local-dir", "hf-hub"):
        return place
    if library == "hf":
        known = rest in CONFIG_MAPPING and not options.get("pretrained")
        return None if known or "config" in options else rest
    return rest if library == "local" else None


def _remedy(side: str, name: str, options: Mapping[str, Any]) -> str:
    """How a tower gets weights."""
    if place := _place(name, options):
        return f"model.{side}.options.pretrained=true takes those of {place}"
    library = name.partition(":")[0]
    other = {
        "timm": f"model.{side}.options.pretrained=true",
        "open_clip": f"model.{side}.options.pretrained=TAG",
    }.get(library, f"model.{side}.name=hf:HUB-ID with model.{side}.options.pretrained=true")
    return f"name some with model.{side}.name=local:FOLDER or {other}"


@dataclass(frozen=True)
class Row:
    """Parameters that learn alike, for a table.

    Attributes:
        names: their names, abridged, such as `text.transformer.encoder.layer.{0..11}.*`.
        tensors: how many.
        values: how many numbers in them.
        frozen: how many of the numbers do not learn.
        rates: lowest and highest share of the learning rate of those that do; 0 if none does.
        weight_decays: those above zero, ascending.
        decaying: how many of the numbers they act on.
    """

    names: str
    tensors: int
    values: int
    frozen: int
    rates: tuple[float, float]
    weight_decays: tuple[float, ...]
    decaying: int


def summary(module: nn.Module, learning: Mapping[str, Learning], *, rows: int = 12) -> list[Row]:
    """A table of how parameters learn: a line for each part of the model that learns alike.

    Blocks that are counted share a line, whatever their rates, and lines are drawn together until
    there are few enough: first those of which all or none is frozen.

    Args:
        module: the module that `learning` tells of.
        learning: from `how_it_learns`.
        rows: how many are few enough.
    """
    parts = list(_parts((), [tuple(name.split(".")) for name in learning], learning))
    while len(parts) > rows and (joined := _drawn_together(parts)):
        parts = joined
    parameters = named(module)
    return [_row(part, learning, parameters) for part in parts]


def format_rows(rows: Iterable[Row], *, learning_rate: float) -> str:
    """The table as text.

    Args:
        rows: from `summary`.
        learning_rate: at its peak, of what has rate 1.
    """
    lines = [("parameters", "tensors", "values", "learning rate", "weight decay")]
    for row in rows:
        rates = " to ".join(dict.fromkeys(f"{rate * learning_rate:.3g}" for rate in row.rates))
        still = f"{_count(row.frozen)} frozen" if row.frozen < row.values else "frozen"
        decays = ", ".join(f"{decay:.3g}" for decay in row.weight_decays)
        lines.append(
            (
                row.names,
                f"{row.tensors:,}",
                _count(row.values),
                ", ".join([rates] * (row.rates[1] > 0) + [still] * (row.frozen > 0)),
                f"{decays} on {_count(row.decaying)}" if decays else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number in (1, 2) else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"


@dataclass(frozen=True)
class _Part:
    """Children of one node of the tree of names, and all parameters below them."""

    parent: tuple[str, ...]
    children: tuple[str, ...]
    names: tuple[str, ...]
    rates: frozenset[float]

    @property
    def path(self) -> tuple[str, ...]:
        return (*self.parent, self.children[0])

    @property
    def counted(self) -> bool:
        return all(child.isdecimal() for child in self.children)

    def joined(self, other: "_Part") -> "_Part":
        """Both on one line."""
        return _Part(
            self.parent,
            self.children + other.children,
            self.names + other.names,
            self.rates | other.rates,
        )

    def joins(self, other: "_Part") -> bool:
        """Whether what follows at the same place shares the line."""
        if not self.parent or self.parent != other.parent:
            return False
        both = self.rates | other.rates
        return len(both) == 1 or (self.counted and other.counted and 0 not in both)


def _parts(
    parent: tuple[str, ...], paths: list[tuple[str, ...]], learning: Mapping[str, Learning]
) -> Iterator[_Part]:
    """The tree below a node, cut where rates differ; neighbours that may share a line do."""
    depth, below = len(parent), {}
    for path in paths:
        below.setdefault(path[depth], []).append(path)
    last: _Part | None = None
    for child, members in below.items():
        names = tuple(".".join(path) for path in members)
        rates = frozenset(learning[name].rate for name in names)
        if len(rates) == 1:
            found = iter([_Part(parent, (child,), names, rates)])
        else:
            found = _parts((*parent, child), members, learning)
        for part in found:
            if last is not None and last.joins(part):
                last = last.joined(part)
                continue
            if last is not None:
                yield last
            last = part
    if last is not None:
        yield last


def _drawn_together(parts: list[_Part]) -> list[_Part] | None:
    """The same table with one of the deepest nodes on one line; None if none is below the top."""
    inside: dict[tuple[str, ...], list[int]] = {}
    for number, part in enumerate(parts):
        for depth in range(1, len(part.parent) + 1):
            inside.setdefault(part.parent[:depth], []).append(number)
    several = sorted((one for one in inside if len(inside[one]) > 1), key=len, reverse=True)
    alike = (one for one in several if len({parts[at].rates == {0} for at in inside[one]}) == 1)
    parent = next(alike, next(iter(several), None))
    if parent is None:
        return None
    first, last = inside[parent][0], inside[parent][-1]
    together = parts[first : last + 1]
    names = tuple(name for part in together for name in part.names)
    rates = frozenset(rate for part in together for rate in part.rates)
    return [*parts[:first], _Part(parent[:-1], parent[-1:], names, rates), *parts[last + 1 :]]


def _row(
    part: _Part, learning: Mapping[str, Learning], parameters: Mapping[str, nn.Parameter]
) -> Row:
    first, end = part.children[0], part.children[-1]
    label = first
    if len(part.children) > 1:
        counted = all(child.isdecimal() for child in part.children)
        label = f"{{{first}..{end}}}" if counted else f"{{{','.join(part.children)}}}"
    sizes = {name: parameters[name].numel() for name in part.names}
    learns = {name: one for name in part.names if (one := learning[name]).rate}
    rates = [one.rate for one in learns.values()] or [0.0]
    whole = part.names == (".".join(part.path),)  # one parameter, not a module
    decays = {one.weight_decay for one in learns.values() if one.weight_decay}
    return Row(
        names=".".join([*part.parent, label]) + ("" if whole else ".*"),
        tensors=len(sizes),
        values=sum(sizes.values()),
        frozen=sum(size for name, size in sizes.items() if name not in learns),
        rates=(min(rates), max(rates)),
        weight_decays=tuple(sorted(decays)),
        decaying=sum(sizes[name] for name, one in learns.items() if one.weight_decay),
    )
