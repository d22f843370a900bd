"""`align export`: a bundle for OpenCLIP, Hugging Face or onnxruntime, and whether they agree."""

from pathlib import Path

from align.bundle import load
from align.interop import export, refuse_to_replace
from align.interop.agreement import caveat, other
from align.interop.torch_readmes import PATHS, moving
from pipelines import run_folder
from pipelines.importing import no_bars
from pipelines.schemas import ExportConfig


def run(config: ExportConfig) -> int:
    """Write the model, seen to give the same when the other library opens it."""
    if config.out.resolve() == Path(config.bundle).resolve():
        raise ValueError(f"{config.out} is the bundle itself; choose another folder")
    refuse_to_replace(config.out, config.to, overwrite=config.overwrite)  # before a model is loaded
    with no_bars():
        model = load(config.bundle)
    files = "image.onnx and text.onnx, for which torch traces both towers" * (config.to == "onnx")
    print(f"writing {files or config.out} ...", flush=True)
    with run_folder.locked_beside(config.out), no_bars():
        agreement = export(model, config.out, to=config.to, overwrite=config.overwrite)
    print(f"{config.out}: {model.config.image.name} and {model.config.text.name}, {config.to}")
    if agreement is None:
        print(f"not compared: {', '.join(other(config.to).missing)} is not installed")
    else:
        print(
            f"cosines of both libraries differ by {agreement.difference:.2g} at most "
            f"(rounding: up to {agreement.tolerance:g})"
        )
    notes = [caveat(model, to=config.to)]
    if config.to == "open_clip":
        notes += [moving(name) for name in PATHS if (config.out / name).is_dir()]
    for note in filter(None, notes):
        print(f"note: {note}")
    return 0


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("export")
