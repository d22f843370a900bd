"""The model card of a bundle: what it is, what it was trained on, what was measured, how to use it.

The table of measured results stands between two comments, and is all that is ever renewed: what
people write around it stays.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from align.model import DualEncoder

BEGIN = "<!-- measured results: written by record_results -->"
END = "<!-- end of measured results -->"
_HEAD = """\
---
library_name: clip-align
pipeline_tag: zero-shot-image-classification
tags:
- clip
- image-text-retrieval
- feature-extraction
# license: say here what others may do with it
---
"""
_USE = """\
```python
import align
from PIL import Image

model = align.load(".")  # this folder, or OWNER/NAME on the hub
labels = ["a red square", "a blue circle"]
picture = Image.new("RGB", (64, 64), "red")  # or Image.open(...)
logits = model.logits(model.encode_image([picture]), model.encode_text(labels))
print(dict(zip(labels, logits{probabilities}[0].tolist())))
```
"""


@dataclass(frozen=True)
class Result:
    """One measured number of a model.

    Attributes:
        task: what was done, such as `unseen artist`.
        figure: what was measured, such as `image_to_text_recall@1`.
        value: the estimate, in `unit`.
        low: lower end of its 95 % interval; None where there is none.
        high: upper end.
        count: how many items were averaged.
        unit: `fraction` (printed as percent), `points` or any other word.
        higher_is_better: its direction.
        chance: what guessing would reach, where that is known.
        protocol: all that two figures must share to be comparable, as JSON values.
    """

    task: str
    figure: str
    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None
    unit: str = "fraction"
    higher_is_better: bool = True
    chance: float | None = None
    protocol: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; what is no finite number becomes null."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def model_card(model: DualEncoder, provenance: Mapping[str, Any]) -> str:
    """The whole card, without results yet.

    Args:
        model: what it describes.
        provenance: `samples`, `steps`, `data` (a fingerprint), `sources`, `start_from` (`bundle`
            and `fingerprint`) and `config` are told where they are there.
    """
    parts = [
        _HEAD,
        f"# {_short(model.config.image.name)} and {_short(model.config.text.name)}, aligned\n",
        "Pictures and texts become unit-length vectors of one space; their dot product says how "
        "well they fit. Trained with Align (`pip install clip-align`).\n",
        "## Use\n",
        _USE.format(probabilities=".sigmoid()" if model.logit_bias.any() else ".softmax(dim=1)"),
        "## What it is\n",
        _table(("", ""), _facts(model)),
    ]
    if data := _data(provenance):
        parts += ["## What it was trained on\n", _table(("", ""), data)]
    if config := provenance.get("config"):
        lines = "\n".join(f"{key}: {value}" for key, value in _flat(config))
        lines = lines.replace("```", "` ` `").replace("<!--", "<! --")
        parts += [
            "<details><summary>Configuration</summary>\n",
            f"```\n{lines}\n```\n",
            "</details>\n",
        ]
    return "\n".join([*parts, "## Measured results\n", results_block([])])


def results_block(results: Sequence[Mapping[str, Any]]) -> str:
    """The part of a card between (and with) the two comments: a table, and a line on each protocol.

    Args:
        results: as `Result.to_json` gives them.
    """
    if not results:
        return f"{BEGIN}\n\nNothing was measured yet.\n\n{END}\n"
    heads = ("task", "figure", "value", "95 % interval", "better", "chance", "items")
    rows, protocols = [], {}
    for result in results:
        interval = [result["low"], result["high"]]
        known = None not in interval
        rows.append(
            (
                result["task"],
                result["figure"],
                f"**{_number(result['value'], result['unit'])}**",
                " to ".join(_number(end, result["unit"]) for end in interval) if known else "-",
                "higher" if result["higher_is_better"] else "lower",
                "-" if result["chance"] is None else _number(result["chance"], result["unit"], 3),
                "-" if result["count"] is None else f"{result['count']:,}",
            )
        )
        protocols[result["task"], _protocol(result["protocol"])] = None
    lines = [f"- {_cell(task)}: {said}" for task, said in protocols if said]
    return "\n".join([BEGIN, "", _table(heads, rows), *lines, "", END, ""])


def with_results(card: bytes, results: Sequence[Mapping[str, Any]]) -> bytes:
    """A card with its table renewed, and every other byte as it was.

    A card without the two comments gets a section at its end.

    Args:
        card: a README.md, which people may have edited.
        results: as `Result.to_json` gives them.
    """
    block, begin, end = results_block(results).encode(), BEGIN.encode(), END.encode()
    start = card.find(begin)
    stop = card.find(end, start)
    if start < 0 or stop < 0:
        gap = b"" if not card else b"\n" if card.endswith(b"\n") else b"\n\n"
        return card + gap + b"## Measured results\n\n" + block
    return card[:start] + block.rstrip(b"\n") + card[stop + len(end) :]


def merged(
    old: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Old results and new ones; what was measured again by the same protocol keeps its place."""
    found = {_identity(result): dict(result) for result in old}
    return list((found | {_identity(result): dict(result) for result in new}).values())


def _identity(result: Mapping[str, Any]) -> tuple[str, ...]:
    protocol = json.dumps(result["protocol"], sort_keys=True)
    return str(result["task"]), str(result["figure"]), protocol


def _facts(model: DualEncoder) -> list[tuple[str, str]]:
    config, tokenizer = model.config, model.tokenizer
    statistics = " / ".join(
        ", ".join(f"{value:.4g}" for value in model.image.statistics[key])
        for key in ("mean", "std")
    )
    cleaned = "" if tokenizer.clean == "none" else f", texts cleaned by `{tokenizer.clean}`"
    fit = "their central square" if config.fit == "crop" else "squeezed into a square"
    scale, bias = model.logit_scale.exp(), model.logit_bias
    temperature = ", ".join(f"{value:.4g}" for value in (1 / scale).flatten().tolist())
    return [
        ("parameters", _count(model)),
        ("image tower", _tower(config.image.name, model.image, config.image.projection)),
        ("text tower", _tower(config.text.name, model.text, config.text.projection)),
        ("width of the space", f"{config.dim}"),
        ("pictures", f"{config.image_size} x {config.image_size} px, {fit}"),
        ("pixel mean / standard deviation", statistics),
        ("longest text", f"{config.context_length} tokens"),
        ("tokenizer", f"{len(tokenizer):,} entries{cleaned}"),
        ("temperature", f"{temperature} (similarities are multiplied by its inverse)"),
        *([("logit bias", f"{bias.max():.4g}")] if bias.any() else []),
    ]


def _data(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("source", f"`{source}`") for source in provenance.get("sources") or []]
    if fingerprint := provenance.get("data"):
        rows.append(("fingerprint of the data", f"`{fingerprint}`"))
    if start := provenance.get("start_from"):
        mark = start.get("fingerprint")
        rows.append(("began as", f"`{start['bundle']}`" + (f" ({mark[:12]})" if mark else "")))
    for key, what in (("samples", "samples seen"), ("steps", "steps")):
        if isinstance(provenance.get(key), int):
            rows.append((what, f"{provenance[key]:,}"))
    return rows


def _tower(name: str, tower: Any, projection: str) -> str:
    return f"`{name}`, {_count(tower)} parameters, width {tower.width}, projection {projection}"


def _short(name: str) -> str:
    """A tower's name without its library, or the folder that it came from."""
    return _cell(name.partition(":")[2].rstrip("/").rpartition("/")[2] or name)


def _count(module: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


def _flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    """A configuration as `key.path` and value, the form in which a command takes them."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            told = json.dumps(value)
            yield f"{before}{key}", str(value) if told == f'"{value}"' else told


def _number(value: float | None, unit: str, digits: int = 1) -> str:
    if value is None:
        return "-"
    if unit == "fraction":
        return f"{100 * value:.1f} %" if digits == 1 else f"{100 * value:.{digits}g} %"
    return f"{100 * value:+.1f} points" if unit == "points" else f"{value:.1f} {unit}"


def _protocol(values: Mapping[str, Any]) -> str:
    """How it was measured, in one line; long lists by their length."""
    said = []
    for key, value in values.items():
        if value in (None, "", [], {}):
            continue
        if isinstance(value, list | dict) and len(json.dumps(value)) > 80:
            value = f"{len(value)} of them"
        text = value if isinstance(value, str) else json.dumps(value)
        said.append(f"{key} {text if len(text) <= 80 else text[:77] + '...'}")
    return _cell("; ".join(said))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(heads), ["---"] * len(heads), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    """One line that neither ends a table's cell nor opens a tag or a comment."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
