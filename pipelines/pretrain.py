"""`align pretrain`: shards in, a trained dual encoder out.

One process or many (`accelerate launch -m pipelines.pretrain CONFIG.yaml`): the same samples in
the same global batches, the same loss, the same gradients.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch

from align.bundle import refuse_place, refuse_unwritable
from align.checkpoint import checkpoints
from pipelines import run_folder
from pipelines.bundles import bundle_of, save_bundle
from pipelines.cadence import agreed
from pipelines.checkup.report import percent
from pipelines.config import ConfigError, read_yaml
from pipelines.guard import measure, refuse_streak, refuse_useless
from pipelines.learning import format_rows, origins, summary
from pipelines.pairs import left_out
from pipelines.parallel import accelerator_of, statistics_of_pieces, stopping_with_others
from pipelines.progress import Observer, StopOnSignal, TrainingLog
from pipelines.run_page import RunFacts, RunPage
from pipelines.saving import Saver, resume, telling_full_disks
from pipelines.schemas import PretrainConfig
from pipelines.starting import starting
from pipelines.step import refuse_long_schedule, step
from pipelines.telemetry import Trackers, refuse_missing_trackers
from pipelines.training import Training, build
from pipelines.validation import Validation
from shards.damage import TooMuchDamageError
from shards.loader import Batch


def run(config: PretrainConfig) -> int:
    """Train until the end, or until asked to stop; then a checkpoint lies ready to go on.

    Returns:
        0 at the end, and after SIGTERM too, so that a scheduler goes on; 130 after SIGINT.
    """
    refuse_missing_trackers(config)
    accelerator = accelerator_of(config)
    config, start = starting(config)
    with ExitStack() as stack:
        stack.enter_context(stopping_with_others(config, accelerator))
        stop = stack.enter_context(StopOnSignal(together=accelerator.num_processes > 1))
        stack.enter_context(telling_full_disks(config.out))
        if accelerator.is_main_process:
            stack.enter_context(run_folder.locked(config.out))
            refuse_to_mix(config)
            refuse_place(bundle_of(config))
            refuse_unwritable(bundle_of(config))
        with stop.at_once():
            training = build(config, accelerator, start)
            stack.enter_context(training.loader)
            if config.resume:
                resume(training)
            refuse_long_schedule(training)
            validation = Validation(training)
        if accelerator.is_main_process:
            record(training)
            print(*introduction(training), sep="\n", flush=True)
        saver = Saver(training)
        code = train(training, saver, validation, stop)
        finished = code is None
        if finished and validation.wanted and validation.measured_at is None:
            measure(validation, saver)  # it was resumed at its very end
        if finished:
            refuse_useless(training, saver)
        if finished:
            write_bundle(training, validation)
        if finished and accelerator.is_main_process:
            done = training.step * config.batch_size
            print(f"{bundle_of(config)}: trained on {done:,} samples", flush=True)
            if training.cut_captions:
                print(cut_off(training), flush=True)
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return code or 0


def write_bundle(training: Training, validation: Validation) -> None:
    """Write the trained model; where its place does not take it, nothing of it is lost.

    Raises:
        OSError: it could not be written, with what can be done about it.
    """
    place, found = bundle_of(training.config), checkpoints(training.config.out)
    try:
        save_bundle(training, validation.last)
    except OSError as error:
        raise OSError(
            f"{place}: {error.strerror or error}; the model lies in {found[-1]}: the same command "
            "with --resume writes it, with --resume bundle=ELSEWHERE to another place"
        ) from error


def refuse_to_mix(config: PretrainConfig) -> None:
    """A folder holds one run; going on with it needs the same configuration.

    Raises:
        ConfigError: the folder holds a run and going on was not asked for, or it is another run.
    """
    earlier = config.out / "config.yaml"
    if not checkpoints(config.out):
        return
    if not config.resume:
        raise ConfigError(
            f"{config.out}: already holds a run; add --resume to go on with it, "
            "or choose another out"
        )
    before, now = read_yaml(earlier), config.model_dump(mode="json")
    fixed = now.keys() - _MAY_CHANGE
    if changed := list(
        changes(
            {key: before.get(key) for key in now if key in fixed},
            {key: value for key, value in now.items() if key in fixed},
        )
    ):
        raise ConfigError(f"{config.out}: the run was started otherwise: {'; '.join(changed)}")


def changes(before: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """What differs between nested values, each by its dotted path.

    >>> list(changes({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "e": 5}}))
    ['b.c: 2 -> 4', 'b.e: not given -> 5', 'b.d: 3 -> not given']
    """
    for key in dict.fromkeys([*now, *before]):
        old, new = before.get(key, _NOT_GIVEN), now.get(key, _NOT_GIVEN)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changes(old, new, f"{above}{key}.")
        elif old != new:
            said = [one if one is _NOT_GIVEN else repr(one) for one in (old, new)]
            yield f"{above}{key}: {said[0]} -> {said[1]}"


_NOT_GIVEN = "not given"
_MAY_CHANGE = {
    "out",
    "bundle",
    "resume",
    "workers",
    "log_every",
    "save_every",
    "keep",
    "max_bad_fraction",
    "strict",
    "validation",
    "trackers",
    "rank_timeout_s",
    # How a step is computed, not what: rounding and what dropout draws differ (and, by pieces, the
    # statistics of batch normalisation), and a run that ran out of memory or time can be helped.
    "micro_batch_size",
    "compile",
    "gradient_checkpointing",
    "text_chunks",
    "shard_weights",
}


def introduction(training: Training) -> list[str]:
    """What is said before the first step: plan, origin of the weights, what learns, notes."""
    lines = [plan(training)]
    if not training.step:  # else they come from the checkpoint
        start = training.start
        lines += (
            [start.told(training.objective)]
            if start
            else origins(training.config, training.objective.model)
        )
    lines += [what_learns(training), *training.notes]
    processes = training.accelerator.num_processes
    if line := statistics_of_pieces(training.objective, training.config, processes=processes):
        lines.append(line)
    if training.config.compile:
        lines.append("compiling the towers: the first step with pictures of a new size is slow")
    return lines


def plan(training: Training) -> str:
    """What lies ahead, in one line."""
    config, total = training.config, training.loader.num_samples
    place = training.loader.manifest.place
    seen, epochs = training.step * config.batch_size, training.steps * config.batch_size / total
    return (
        f"{total:,} samples in {place}; {training.steps:,} steps of {config.batch_size} are "
        f"{epochs:.1f} epochs; {training.parameters / 1e6:.1f} M parameters on "
        f"{training.accelerator.device}"
        + (f"; {seen:,} samples done before" if seen else "")
        + left_out(training.loader.manifest)
    )


def what_learns(training: Training) -> str:
    """A table of which parameters learn, how fast and with what decay."""
    rows = summary(training.objective, training.learning)
    return format_rows(rows, learning_rate=training.config.optimizer.learning_rate)


def cut_off(training: Training) -> str:
    """How many captions lost their end, in one line."""
    share = training.cut_captions / (training.step * training.config.batch_size)
    return (
        f"{percent(share)} of the captions were longer than context_length "
        f"{training.config.model.context_length} tokens and were cut"
    )


def record(training: Training) -> None:
    """Say in the run folder what the run is, and forget what was logged after its checkpoint."""
    config = training.config
    run_folder.record(
        config.out,
        config,
        data={"samples": training.loader.num_samples, "fingerprint": training.fingerprint},
        parameters=training.parameters,
        processes=training.accelerator.num_processes,
        device=str(training.accelerator.device),
        threads=torch.get_num_threads(),
        learning=[asdict(row) for row in summary(training.objective, training.learning)],
    )
    if training.start is not None:
        training.start.keep(config.out)
    run_folder.keep_metrics(config.out / "metrics.jsonl", up_to_step=training.step)


def train(
    training: Training, saver: Saver, validation: Validation, stop: StopOnSignal
) -> int | None:
    """Next batch, step, log, save, evaluate, stop; returns the exit code where it was stopped."""
    config, accelerator = training.config, training.accelerator
    writes = accelerator.is_main_process
    log = TrainingLog(
        config.out / "metrics.jsonl" if writes else None,
        ledger=training.ledger,
        steps=training.steps,
        done=training.step,
        batch_size=config.batch_size,
        every=config.log_every,
        observers=observers(training) if writes else (),
        best=config.validation.best,
    )
    owed_save = owed_look = False  # from steps whose gradient was not finite
    with log:
        if look_was_cut_off(training, validation):
            look(training, saver, validation, log, stop)
        batches = iter(training.loader)
        while training.step < training.steps:
            started = time.perf_counter()
            batch = next_batch(training, saver, batches)
            measured = {"data_ms": 1000 * (time.perf_counter() - started)}
            measured |= step(training, batch)
            if line := log.step(training.step, measured):
                counts = {"skipped_steps": training.skipped, "bad_samples": training.bad_samples}
                log.write({**line, **counts, "cut_captions": training.cut_captions})

            # Where the loss was scaled too much, the scale is what mends it.
            good = bool(measured["finite"]) or training.scale_can_fall
            training.bad_in_a_row = 0 if good else training.bad_in_a_row + 1
            last = training.step == training.steps
            refuse_streak(training, saver, last=last)
            if measured["finite"]:
                saver.is_good()
            by_clock = (saver.cadence.elapsed(), validation.cadence.elapsed())
            terminated, interrupted, save_now, look_now = agreed(
                accelerator, (stop.terminated, stop.interrupted, *by_clock)
            )
            stopped = (terminated or interrupted) and not last
            looks = validation.wanted and (
                look_now or validation.cadence.due(training.step) or last or owed_look
            )
            owed_look, looks = looks and not good, looks and good
            saves = saver.cadence.due(training.step) or save_now or looks or stopped or last
            saves |= owed_save
            owed_save = saves and not good
            if saves and good:  # else what there is to go on from would be of a run gone wrong
                with log.pause():
                    saver.save()
            if stopped:
                again = "the same command" if config.resume else "the same command with --resume"
                saved = (
                    f"with a checkpoint in {config.out}; {again} goes on"
                    if good
                    else "without a checkpoint of it, as its gradient was not finite; "
                    f"{again} "
                    + ("goes on from the one before" if checkpoints(config.out) else "begins anew")
                )
                log.say(f"stopped at step {training.step} of {training.steps} {saved}")
                return 130 if interrupted else 0
            if looks:
                look(training, saver, validation, log, stop)
    return None


def observers(training: Training) -> list[Observer]:
    """What follows the lines of a run: its page, and the trackers that are asked for."""
    config, accelerator = training.config, training.accelerator
    facts = RunFacts(
        config=config,
        steps=training.steps,
        samples=training.loader.num_samples,
        parameters=training.parameters,
        processes=accelerator.num_processes,
        device=str(accelerator.device),
    )
    page = RunPage(facts, config.out / "metrics.jsonl", config.out / "report.html")
    if not config.trackers:
        return [page]
    return [page, Trackers(accelerator, config, step=training.step)]


def look(
    training: Training, saver: Saver, validation: Validation, log: TrainingLog, stop: StopOnSignal
) -> None:
    """Evaluate, and keep the best; what was learnt is saved, so that a signal need not wait."""
    with log.pause(), stop.at_once():
        line = measure(validation, saver)
        saver.judge(validation.best, validation.best_of)
        log.write({"step": training.step, **line})


def look_was_cut_off(training: Training, validation: Validation) -> bool:
    """Whether the evaluation of the step that a run goes on from was stopped before its line."""
    step, path = training.step, training.config.out / "metrics.jsonl"
    due = validation.cadence.due(step) or step == training.steps
    if not (step and validation.wanted and due):
        return False
    missing = training.accelerator.is_main_process and not any(
        line["step"] == step and "learning_rate" not in line
        for line in run_folder.read_metrics(path)
    )
    return agreed(training.accelerator, [missing])[0]


def next_batch(training: Training, saver: Saver, batches: Iterator[Batch]) -> Batch:
    """The next batch; where the data turns out too damaged, what was learnt so far is saved first.

    Raises:
        TooMuchDamageError: it did, with what can be done about it.
    """
    try:
        return next(batches)
    except TooMuchDamageError as error:
        # Alone: other processes may not have met the damage, and would wait for ever.
        alone = training.accelerator.num_processes == 1
        if alone and training.step:
            saver.save()
        raise TooMuchDamageError(
            f"{error}; --resume with a higher max_bad_fraction goes on, "
            "align inspect --verify names all of them for another run"
        ) from None


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("pretrain")
