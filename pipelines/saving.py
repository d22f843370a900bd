"""Checkpoints of a run: when, which are kept, and how a run goes on from the newest."""

import shutil
from pathlib import Path

from align.checkpoint import checkpoints, load_state, save_state
from pipelines import run_folder
from pipelines.cadence import Cadence
from pipelines.config import ConfigError
from pipelines.training import Training


class Saver:
    """Writes checkpoints at their cadence, and forgets the oldest.

    Args:
        training: the run.
    """

    def __init__(self, training: Training) -> None:
        config = training.config
        self.cadence = Cadence(
            config.save_every, batch_size=config.batch_size, epoch=training.loader.num_samples
        )
        self._training = training

    def save(self) -> Path:
        """Write a whole checkpoint, then forget the oldest beyond what is to be kept."""
        training, config = self._training, self._training.config
        report = training.data_report()
        folder = config.out / "checkpoints" / f"step_{training.step:09d}"
        if training.accelerator.is_main_process:
            save_state(
                folder,
                module=training.objective,
                optimizer=training.optimizer,
                average=training.average,
                progress={
                    "step": training.step,
                    "skipped": training.skipped,
                    "loader": {"consumed": training.step * config.batch_size},
                    "log": training.ledger.state(),
                    "data": training.fingerprint,
                    "data_report": report,
                },
            )
            for old in checkpoints(config.out)[: -config.keep]:
                shutil.rmtree(old)
            run_folder.write_json(config.out / "data_report.json", report)
        training.accelerator.wait_for_everyone()
        self.cadence.done()
        return folder


def resume(training: Training) -> None:
    """Go on from the newest whole checkpoint, where there is one."""
    config = training.config
    found = checkpoints(config.out)
    if not found:
        return
    progress = load_state(
        found[-1],
        module=training.objective,
        optimizer=training.optimizer,
        average=training.average,
    )
    if progress["data"] != training.fingerprint:
        raise ConfigError(
            f"{training.loader.manifest.place}: not the data this run was started with "
            f"(fingerprint {training.fingerprint[:12]}, before {progress['data'][:12]})"
        )
    training.step, training.skipped = progress["step"], progress["skipped"]
    training.loader.load_state_dict(progress["loader"])
    training.earlier_report = progress["data_report"]
    training.ledger.restore(progress["log"])
    training.cut_captions = progress["data_report"]["cut_captions"]
