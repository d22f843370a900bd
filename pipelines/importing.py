"""`align import`: a model of OpenCLIP or Hugging Face as a bundle; `import` names no module."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging

from align.bundle import save
from align.interop import read_foreign, refuse_to_replace
from align.model import DualEncoder
from pipelines import run_folder
from pipelines.schemas import ImportConfig


def run(config: ImportConfig) -> int:
    """Read the model, write the bundle, say what it is."""
    if config.out.resolve() == Path(config.source).resolve():
        raise ValueError(f"{config.out} is the model itself; choose another folder")
    refuse_to_replace(config.out, "bundle", overwrite=config.overwrite)  # before a model is fetched
    with no_bars():
        model = read_foreign(config.source)
    with run_folder.locked_beside(config.out):
        save(model, config.out, provenance={"imported": config.source})
    print(f"{config.out}: {describe(model)}")
    return 0


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for every file of weights; downloads have theirs."""
    drawn, downloads = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()  # the hub's bars too
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        if drawn and downloads:
            logging.enable_progress_bar()


def describe(model: DualEncoder) -> str:
    """A model in some lines."""
    config, tokenizer = model.config, model.tokenizer
    parameters = {
        side: sum(weight.numel() for weight in tower.parameters()) / 1e6
        for side, tower in (("image", model.image), ("text", model.text))
    }
    scale, bias = float(model.logit_scale.exp()), float(model.logit_bias)
    return (
        f"{config.dim} dimensions\n"
        f"  image   {model.image.name}, {parameters['image']:.1f} M parameters, "
        f"pictures of {config.image_size} px ({config.fit})\n"
        f"  text    {model.text.name}, {parameters['text']:.1f} M parameters, "
        f"{tokenizer.context_length} tokens at most\n"
        f"  tokens  {len(tokenizer):,} entries, texts cleaned: {tokenizer.clean}\n"
        f"  logits  {scale:.4g} x cosine {bias:+.4g}"
    )


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("import")
