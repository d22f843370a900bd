"""Pictures and texts before the towers, in the files of Hugging Face's processors, both ways."""

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Regex, normalizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoImageProcessor, PreTrainedTokenizerFast

from align.encoders.tower import refusals
from align.model import DualEncoder
from align.tokenizer import Tokenizer


@dataclass(frozen=True)
class PictureFormat:
    """What a picture is made into before the tower sees it.

    Attributes:
        size: side of the square, in pixels.
        fit: one of `align.preprocess.FITS`.
        mean: per channel, of pixel values in [0, 1].
        std: likewise.
    """

    size: int
    fit: str
    mean: list[float]
    std: list[float]


def read_picture_format(source: str) -> PictureFormat:
    """The picture format of a model in the hub's format, out of its image processor.

    Whatever way of interpolation it names, pictures are scaled by `align.preprocess`: bicubic, as
    CLIP's and SigLIP's are.

    Args:
        source: a hub id or a folder with `preprocessor_config.json` or `processor_config.json`.

    Raises:
        ValueError: no such file, or pictures that do not become squares as `align.preprocess`
            makes them.
    """
    with refusals(f"{source} has no image processor that could be read"):
        processor: Any = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    if (settings := getattr(processor, "data_config", None)) is not None:  # timm's own format
        return _timm_format(source, settings)
    size, fit = _square(source, processor)
    # (f x - mean) / std, of pixels x in [0, 255], as (x / 255 - mean') / std'.
    unit = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
    normalised = processor.do_normalize
    mean = processor.image_mean if normalised else [0.0] * 3
    std = processor.image_std if normalised else [1.0] * 3
    exact = abs(unit - 1) < 1e-6  # 0.00392156862745098 times 255 is one
    return PictureFormat(
        size,
        fit,
        [float(x) if exact else float(x) / unit for x in mean],
        [float(x) if exact else float(x) / unit for x in std],
    )


def _square(source: str, processor: Any) -> tuple[int, str]:
    """Side and fit, if the processor makes squares as `align.preprocess` does."""
    size, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    cropped = bool(getattr(processor, "do_center_crop", False))
    shortest = size.get("shortest_edge")
    side = shortest if shortest else size.get("height")
    square = bool(shortest) or size.get("height") == size.get("width")
    if cropped and (crop.get("height") != side or crop.get("width") != side):
        square = False
    if not processor.do_resize or side is None or not square or (shortest and not cropped):
        raise ValueError(
            f"{source}: its image processor (size {size}, crop_size {crop if cropped else None}) "
            "neither scales the shorter side and cuts a square of that size nor squeezes pictures "
            "into a square; make preprocessor_config.json say one of the two"
        )
    return int(side), "crop" if shortest else "squash"


def _timm_format(source: str, settings: dict[str, Any]) -> PictureFormat:
    height, width = settings["input_size"][-2:]
    squash = settings.get("crop_mode") == "squash"
    if height != width or (not squash and settings.get("crop_pct", 1.0) != 1.0):
        raise ValueError(
            f"{source}: its pictures are scaled to more than the square that is cut from them "
            f"(crop_pct {settings.get('crop_pct')}); add a preprocessor_config.json that is not so"
        )
    fit = "squash" if squash else "crop"
    return PictureFormat(height, fit, list(settings["mean"]), list(settings["std"]))


def read_tokenizer(source: str, *, positions: int) -> Tokenizer:
    """The tokenizer of a model in the hub's format, which cuts texts where its own does.

    Args:
        source: a hub id or a folder.
        positions: what the text tower can take, in tokens.

    Raises:
        ValueError: there is none that can be read.
    """
    name = Path(source).resolve() if Path(source).is_dir() else source  # a folder may be "clip"
    tokenizer = Tokenizer.load(name, context_length=positions)
    tokenizer.context_length = min(positions, tokenizer.backend.model_max_length)
    return tokenizer


def write_processor(model: DualEncoder, folder: Path, *, family: str, masked: bool) -> None:
    """Write tokenizer, image processor and processor as `AutoProcessor` and its kin read them.

    Texts are cut where ours are; where padding counts (SigLIP), they are padded to that length too.

    Args:
        model: whose pictures and texts they are.
        folder: where the model's configuration lies.
        family: `CLIP`, `Siglip` or `VisionTextDualEncoder`.
        masked: whether the text tower looks at an attention mask.

    Raises:
        ValueError: texts are cut elsewhere than where the tower has them padded to.
    """
    length, padded = model.config.context_length, model.text.fixed_length
    if padded not in {None, length}:
        raise ValueError(
            f"{model.text.name} pads texts to {padded} tokens, and the model cuts them to its "
            f"context_length of {length}: Hugging Face's tokenizers do both at one length"
        )
    tokenizer = _with_cleaning(model.tokenizer)
    backend = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        padding_side="right",
        truncation_side="right",
        model_input_names=["input_ids", "attention_mask"] if masked else ["input_ids"],
        **model.tokenizer.backend.special_tokens_map,
    )
    pixels: dict[str, Any] = {
        "image_mean": model.image.statistics["mean"],
        "image_std": model.image.statistics["std"],
    }
    side = {"height": model.config.image_size, "width": model.config.image_size}
    if model.config.fit == "crop":
        pixels |= {"size": {"shortest_edge": model.config.image_size}, "crop_size": side}
        image = transformers.CLIPImageProcessor(**pixels)
    else:
        image = transformers.SiglipImageProcessor(**pixels, size=side)
    # Both files: programs before transformers 5 look for the first, later ones for the second.
    image.save_pretrained(folder)
    processor = getattr(transformers, f"{family}Processor")
    processor(image_processor=image, tokenizer=backend).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # The name that programs before transformers 5 know as well.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _with_cleaning(tokenizer: Tokenizer) -> RawTokenizer:
    """A copy whose own normaliser does what `Tokenizer.clean` does, as far as it can.

    `Tokenizer.clean` begins with `ftfy.fix_text`. Characters that stand for others, terminal
    escapes, control characters, composition (NFC), case, punctuation and spaces can be said; a
    normaliser cannot repair encodings nor resolve HTML entities.
    """
    raw = RawTokenizer.from_str(tokenizer.backend.backend_tokenizer.to_str())
    raw.no_truncation()
    raw.no_padding()
    if tokenizer.clean == "none":
        return raw
    steps: list[Any] = [normalizers.Replace(one, other) for one, other in _stand_ins().items()]
    steps += [normalizers.Replace(Regex(one), other) for one, other in _REPAIRS]
    steps.append(normalizers.NFC())
    if tokenizer.clean == "canonicalize":
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(_PUNCTUATION), "")]
    if tokenizer.clean in {"canonicalize", "lower"}:
        steps.append(normalizers.Lowercase())
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    own = [raw.normalizer] if raw.normalizer is not None else []
    raw.normalizer = normalizers.Sequence([*steps, *own])  # pyright: ignore[reportAttributeAccessIssue]
    return raw


def _stand_ins() -> dict[str, str]:
    """Ligatures of Latin letters and characters of another width, with what they stand for.

    Those that `ftfy.fix_text` replaces (Speer 2019); of the rest of NFKC it does nothing.
    """
    wide = [chr(code) for code in (0x3000, *range(0xFF01, 0xFFF0))]
    known = {one: unicodedata.normalize("NFKC", one) for one in (*_LIGATURES, *wide)}
    known["\N{LATIN SMALL LIGATURE LONG S T}"] = "\N{LATIN SMALL LETTER LONG S}t"
    return {one: other for one, other in known.items() if one != other}


_LIGATURES = [
    *map(chr, (0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4))),
    *map(chr, range(0xFB00, 0xFB07)),
]
_REPAIRS = (
    (r"[\x{02BC}\x{2018}-\x{201B}]", "'"),
    (r"[\x{201C}-\x{201F}]", '"'),
    (r"\x1B\[[0-9;]*[a-zA-Z]", ""),  # a terminal's colours
    (
        r"[\x00-\x08\x0B\x0E-\x1F\x7F\x{206A}-\x{206F}\x{FEFF}\x{FFF9}-\x{FFFC}]",
        "",
    ),
)
_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^`{|}~]"""
