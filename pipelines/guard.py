"""A run whose weights or gradients are no longer finite ends, and keeps what was good."""

from typing import Any

from eval.metrics import NOT_FINITE
from pipelines.health import embeds, weights_are_finite
from pipelines.saving import Saver
from pipelines.training import Training
from pipelines.validation import Validation

BAD_STEPS_IN_A_ROW = 5
"""After so many steps without a finite gradient the run stops: nothing good follows."""


def measure(validation: Validation, saver: Saver) -> dict[str, Any]:
    """Evaluate.

    Raises:
        ValueError: embeddings are not finite, with what there is to go on from; or another fault.
    """
    try:
        return validation.run()
    except ValueError as error:
        if NOT_FINITE not in str(error):
            raise
        raise saver.useless(str(error)) from error


def refuse_streak(training: Training, saver: Saver, *, last: bool) -> None:
    """End a run of which nothing good follows; one that ends in such steps has learnt no better.

    Raises:
        ValueError: it is one, with what there is to go on from.
    """
    number = training.bad_in_a_row
    if number == 1 and not weights_are_finite(training):
        raise saver.useless(f"weights are not finite at step {training.step}")
    if number == BAD_STEPS_IN_A_ROW or (number and last):
        steps = f"{number} steps up to step" if number > 1 else "the last step,"
        raise saver.useless(f"no finite gradient in {steps} {training.step}")


def refuse_useless(training: Training, saver: Saver) -> None:
    """See whether what was learnt is of use before it becomes a bundle.

    Raises:
        ValueError: it is not, with what there is to go on from.
    """
    if not weights_are_finite(training):
        raise saver.useless(f"weights are not finite at step {training.step}")
    refuse_streak(training, saver, last=True)
    if not embeds(training):
        raise saver.useless("the trained model embeds as values that are not finite")
    saver.is_good()
