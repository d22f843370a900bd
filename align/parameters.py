"""Which parameters learn, how fast and with what decay: rules by name pattern, later ones win.

A name is that of `named_parameters()` of the dual encoder, such as `image.backbone.conv1.weight` or
`text.transformer.encoder.layer.0.output.dense.bias`; beside the model stands `loss.logit_scale`.
To lock a tower and to let rates fall from layer to layer are rules as well.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from align.encoders.tower import TowerModule, near


@dataclass(frozen=True)
class Rule:
    """What a pattern says of the parameters whose names it matches.

    Attributes:
        match: pattern of names, as of files: `*` stands for anything, dots too.
        rate: learning rate as a share of the run's; 0 = frozen; None = as it was.
        weight_decay: in place of the run's; None = as it was.

    Raises:
        ValueError: it says nothing, or a number below zero.
    """

    match: str
    rate: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if self.rate is None and self.weight_decay is None:
            raise ValueError(f"rule {self.match!r} says neither rate nor weight_decay")
        for key in ("rate", "weight_decay"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"rule {self.match!r}: {key} {value} must be 0 or more")


@dataclass(frozen=True)
class Learning:
    """How a parameter learns.

    Attributes:
        rate: learning rate as a share of the run's; 0 = frozen.
        weight_decay: pull towards zero (Loshchilov and Hutter 2019, arXiv 1711.05101).
        kind: a matrix or kernel; a table of entries (embeddings, positions, class tokens, queries
            of a pooling), whose rows are no directions of a map; or a gain, a bias, a temperature.
    """

    rate: float
    weight_decay: float
    kind: Literal["matrix", "table", "gain"]


def named(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by the name that rules know it by: of an objective, without `model.`.

    A parameter that is used in several places has the name of the first.
    """
    return {_short(name): parameter for name, parameter in module.named_parameters()}


def how_it_learns(
    module: nn.Module, rules: Iterable[Rule] = (), *, weight_decay: float
) -> dict[str, Learning]:
    """How each parameter learns, by name.

    Without rules all learn at one rate. Matrices, kernels and tables of embeddings decay; gains,
    biases and the temperature do not, since zero is no sensible default for them; nor do positions,
    class tokens and queries that are parameters of their own, whatever library they are of; nor
    does what an architecture exempts by `no_weight_decay()`.

    Args:
        module: an objective or a model. Nothing of it changes, see `freeze`.
        rules: in order. What the module holds fixed already (`requires_grad` is false) stays so.
        weight_decay: of what decays.

    Raises:
        ValueError: a rule matches nothing.

    Example:
        >>> how_it_learns(nn.LayerNorm(3), [Rule("b*", rate=0.1)], weight_decay=0.2)
        {'weight': Learning(rate=1.0, weight_decay=0.0, kind='gain'),
         'bias': Learning(rate=0.1, weight_decay=0.0, kind='gain')}
    """
    tables, exempt = _tables(module), _exempt(module) | _entries(module)
    found = {}
    for name, parameter in named(module).items():
        table = id(parameter) in tables or (id(parameter) in exempt and parameter.ndim > 1)
        kind = "table" if table else "gain" if parameter.ndim < 2 else "matrix"
        decay = 0.0 if kind == "gain" or id(parameter) in exempt else weight_decay
        found[name] = Learning(1.0, decay, kind)
    for rule in rules:
        said = {"rate": rule.rate, "weight_decay": rule.weight_decay}
        said = {key: float(value) for key, value in said.items() if value is not None}
        for name in _matched(module, rule.match):
            found[name] = replace(found[name], **said)
    for name, parameter in named(module).items():
        if not parameter.requires_grad:
            found[name] = replace(found[name], rate=0.0)
    return found


def freeze(module: nn.Module, learning: Mapping[str, Learning]) -> None:
    """Let no gradient reach what has rate 0.

    Args:
        module: the module that `learning` tells of.
        learning: from `how_it_learns`.
    """
    for name, parameter in named(module).items():
        if learning[name].rate == 0:
            parameter.requires_grad_(False)


def locked(side: str, tower: TowerModule, *, trainable: int) -> list[Rule]:
    """Rules that freeze a tower but for its last groups of layers.

    A tower locked as a whole beside one that learns is LiT (Zhai et al. 2022, arXiv 2111.07991).
    The projection behind the tower is not part of it.

    Args:
        side: what the names of its parameters begin with, `image` or `text`.
        tower: the tower; `layer_groups()` says what its groups are.
        trainable: how many of them learn, from the end.

    Raises:
        ValueError: it has fewer groups.
    """
    groups = tower.layer_groups()
    if trainable > len(groups):
        raise ValueError(
            f"{tower.name} has {len(groups)} groups of layers; {trainable} of them cannot be "
            "trainable"
        )
    frozen = [name for group in groups[: len(groups) - trainable] for name in group]
    return [Rule(f"{side}.{pattern}", rate=0.0) for pattern in _cover(frozen, tower)]


def falling(side: str, tower: TowerModule, *, factor: float) -> list[Rule]:
    r"""Rules by which rates fall from a tower's last group of layers to its first.

    Of $n$ groups, group $i$ learns at $f^{\,n - i}$ of the rate (ELECTRA: Clark et al. 2020, arXiv
    2003.10555; BEiT: Bao et al. 2022, arXiv 2106.08254): what lies near the input is general
    already, and is kept.

    Args:
        side: what the names of its parameters begin with, `image` or `text`.
        tower: the tower; `layer_groups()` says what its groups are.
        factor: $f$; 1 = the same rate for all.
    """
    groups = tower.layer_groups()
    return [
        Rule(f"{side}.{pattern}", rate=factor ** (len(groups) - number))
        for number, group in enumerate(groups, start=1)
        for pattern in _cover(group, tower)
    ]


def _short(name: str) -> str:
    return name.removeprefix("model.")


def _tables(module: nn.Module) -> set[int]:
    """Ids of the parameters of embeddings."""
    return {
        id(parameter)
        for part in module.modules()
        if isinstance(part, nn.Embedding)
        for parameter in part.parameters(recurse=False)
    }


def _exempt(module: nn.Module) -> set[int]:
    """Ids of the parameters that their architecture wants without decay."""
    found = set()
    for part in module.modules():
        wanted = getattr(part, "no_weight_decay", None)
        if callable(wanted):
            names = set(wanted())  # pyright: ignore[reportArgumentType]
            found |= {id(one) for name, one in part.named_parameters() if name in names}
    return found


def _entries(module: nn.Module) -> set[int]:
    """Ids of positions, class tokens and queries: of more than one side, and no layer's weight.

    Layers of all libraries name what maps `weight`, or like `in_proj_weight`. What has three sides
    above one, such as a layer of experts, is a stack of matrices.
    """
    return {
        id(parameter)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if parameter.ndim > 1
        and "weight" not in name
        and not (parameter.ndim == 3 and min(parameter.shape) > 1)
    }


def _matched(module: nn.Module, pattern: str) -> list[str]:
    """Names of the parameters that have a name which a pattern matches.

    Raises:
        ValueError: there are none.
    """
    places = [
        (_short(name), id(one)) for name, one in module.named_parameters(remove_duplicate=False)
    ]
    wanted = {number for name, number in places if fnmatchcase(name, pattern)}
    if not wanted:
        parents = {name.rpartition(".")[0] + ".*" for name, _ in places if "." in name}
        hint = near(pattern, {*parents, *(name for name, _ in places)})
        tops = dict.fromkeys(name.partition(".")[0] for name, _ in places)
        raise ValueError(
            f"rule {pattern!r} matches no parameter{hint}; names begin with {', '.join(tops)}"
        )
    return [name for name, one in named(module).items() if id(one) in wanted]


def _cover(chosen: Collection[str], tower: nn.Module) -> list[str]:
    """The shortest patterns that match these names of parameters and no other."""
    every = [name for name, _ in tower.named_parameters(remove_duplicate=False)]
    others = set(every) - set(chosen)
    mixed = {part for name in others for part in _ancestors(name)}
    patterns = (
        next((f"{part}.*" for part in _ancestors(name) if part not in mixed), name)
        for name in chosen
    )
    return list(dict.fromkeys(patterns))


def _ancestors(name: str) -> list[str]:
    """`a.b.c` lies in `a`, then in `a.b`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
