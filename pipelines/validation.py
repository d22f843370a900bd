"""Evaluation while training: at its own cadence, on what is held out."""

from typing import Any

from eval.results import Report
from pipelines.cadence import Cadence
from pipelines.embed import embed_pairs
from pipelines.evaluate import retrieval_report
from pipelines.training import Training

_FIGURES = (
    *("image_to_text_recall@1", "image_to_text_recall@5"),
    *("text_to_image_recall@1", "text_to_image_recall@5"),
)


class Validation:
    """Measures the weights that would be saved.

    Args:
        training: the run.
    """

    def __init__(self, training: Training) -> None:
        config = training.config
        self.cadence = Cadence(
            config.validation.every,
            batch_size=config.batch_size,
            epoch=training.loader.num_samples,
        )
        self.wanted = config.validation.data is not None
        self.last: Report | None = None
        self._training = training

    def run(self) -> dict[str, Any]:
        """Recall at 1 and 5 both ways, by the main process while the others wait."""
        training, figures = self._training, {}
        if training.accelerator.is_main_process:
            self.last = self.measure()
            figures = {
                "samples": training.step * training.config.batch_size,
                **{name: self.last[name].value for name in _FIGURES},
            }
        training.accelerator.wait_for_everyone()
        self.cadence.done()
        return figures

    def measure(self) -> Report:
        """Retrieval both ways on the validation set."""
        training, config = self._training, self._training.config
        assert config.validation.data is not None
        embedded = embed_pairs(
            training.chosen_model,
            config.validation.data,
            where=config.validation.where,
            image_size=training.image_size,
            caption_fields=config.caption_fields,
            max_bad_fraction=config.max_bad_fraction,
            strict=config.strict,
        )
        protocol = {
            "data": embedded.fingerprint,
            "where": config.validation.where,
            "bad_samples_left_out": embedded.bad,
        }
        return retrieval_report(embedded, title="validation", protocol=protocol)
