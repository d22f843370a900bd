"""`align export`: a bundle for OpenCLIP, Hugging Face or onnxruntime, and whether they agree."""

import sys
from pathlib import Path

from align.bundle import load
from align.interop import export, refuse_to_replace
from align.interop.agreement import compare
from pipelines import run_folder
from pipelines.importing import no_bars
from pipelines.schemas import ExportConfig


def run(config: ExportConfig) -> int:
    """Write the model, open it with the other library, compare; 1 if the logits differ."""
    if config.out.resolve() == Path(config.bundle).resolve():
        raise ValueError(f"{config.out} is the bundle itself; choose another folder")
    refuse_to_replace(config.out, config.to, overwrite=config.overwrite)  # before a model is loaded
    with no_bars():
        model = load(config.bundle)
    with run_folder.locked_beside(config.out), no_bars():
        export(model, config.out, to=config.to, overwrite=config.overwrite)
        print(f"{config.out}: {model.config.image.name} and {model.config.text.name}, {config.to}")
        try:
            agreement = compare(model, config.out, to=config.to)
        except ValueError as error:
            print(f"not compared: {error}")
            return 0
    said = (
        f"logits of both libraries differ by {agreement.difference:.2g} at most "
        f"(rounding: up to {agreement.tolerance:.2g})"
    )
    if agreement.holds:
        print(said)
        return 0
    print(f"align export: {said}: do not use {config.out}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("export")
