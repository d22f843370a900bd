"""`align pretrain`: shards in, a trained dual encoder out.

One process or many (`accelerate launch -m pipelines.pretrain CONFIG.yaml`): the same samples in
the same global batches, the same loss, the same gradients.
"""

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator

from align.bundle import refuse_place
from align.checkpoint import checkpoints, load_state, save_state
from align.optim import cosine_factor, set_learning_rate
from eval.results import Report
from pipelines import run_folder
from pipelines.bundles import bundle_of, save_bundle
from pipelines.captions import positive_labels
from pipelines.checkup.report import percent
from pipelines.config import ConfigError, read_yaml
from pipelines.embed import embed_pairs, left_out
from pipelines.evaluate import retrieval_report
from pipelines.learning import format_rows, origins, summary
from pipelines.progress import StopOnSignal, TrainingLog
from pipelines.schemas import PretrainConfig
from pipelines.training import Training, any_rank, build, over_ranks, training_pictures
from shards.damage import TooMuchDamageError
from shards.loader import Batch

BAD_STEPS_IN_A_ROW = 5
"""After so many steps without a finite gradient the run stops: nothing good follows."""


def run(config: PretrainConfig) -> int:
    """Train until the end, or until asked to stop; then a checkpoint lies ready to go on."""
    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(run_folder.locked(config.out))
            refuse_to_mix(config)
            refuse_place(bundle_of(config))
        training = build(config, accelerator)
        stack.enter_context(training.loader)
        if config.resume:
            resume(training)
        if accelerator.is_main_process:
            record(training)
            print(*introduction(training), sep="\n", flush=True)
        finished = train(training)
        if finished and accelerator.is_main_process:
            # A run that was resumed at its very end has not measured it.
            wanted = config.validation.data is not None
            save_bundle(training, training.validated or (measure(training) if wanted else None))
            done = training.step * config.batch_size
            print(f"{bundle_of(config)}: trained on {done:,} samples", flush=True)
            if training.cut_captions:
                print(cut_off(training), flush=True)
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0 if finished else 130


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
    changed = [
        f"{key}: {before.get(key)!r} -> {value!r}"
        for key, value in now.items()
        if key not in _MAY_CHANGE and before.get(key) != value
    ]
    if changed:
        raise ConfigError(f"{config.out}: the run was started otherwise: {'; '.join(changed)}")


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
    # How a step is computed, not what: rounding and what dropout draws differ, and a run that ran
    # out of memory or time can be helped.
    "compile",
    "gradient_checkpointing",
    "text_chunks",
}


def introduction(training: Training) -> list[str]:
    """What is said before the first step: plan, origin of the weights, what learns, notes."""
    lines = [plan(training)]
    if not training.step:  # else they come from the checkpoint
        lines += origins(training.config, training.objective.model)
    lines += [what_learns(training), *training.notes]
    if training.config.compile:
        lines.append("compiling the towers: the first step with pictures of a new size is slow")
    return lines


def plan(training: Training) -> str:
    """What lies ahead, in one line."""
    config, total = training.config, training.loader.num_samples
    place = training.loader.manifest.place
    parameters = sum(one.numel() for one in training.objective.parameters())
    seen = training.step * config.batch_size
    return (
        f"{total:,} samples in {place}; {training.steps:,} steps of {config.batch_size} are "
        f"{config.samples / total:.1f} epochs; {parameters / 1e6:.1f} M parameters on "
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
        parameters=sum(one.numel() for one in training.objective.parameters()),
        processes=training.accelerator.num_processes,
        device=str(training.accelerator.device),
        threads=torch.get_num_threads(),
        learning=[asdict(row) for row in summary(training.objective, training.learning)],
    )
    run_folder.keep_metrics(config.out / "metrics.jsonl", up_to_step=training.step)


def train(training: Training) -> bool:
    """Next batch, step, log, save, evaluate, stop; returns whether the end was reached."""
    config, accelerator = training.config, training.accelerator
    writes = accelerator.is_main_process
    log = TrainingLog(
        config.out / "metrics.jsonl" if writes else None,
        steps=training.steps,
        done=training.step,
        batch_size=config.batch_size,
        every=config.log_every,
    )
    bad_in_a_row = 0
    with StopOnSignal() as stop, log:
        batches = iter(training.loader)
        while training.step < training.steps:
            started = time.perf_counter()
            batch = next_batch(training, batches)
            measured = {"data_ms": 1000 * (time.perf_counter() - started)}
            measured |= step(training, batch)
            if line := log.step(training.step, measured):
                counts = {"bad_samples": training.bad_samples}
                log.write({**line, **counts, "cut_captions": training.cut_captions})

            bad_in_a_row = 0 if measured["finite"] else bad_in_a_row + 1
            if bad_in_a_row == BAD_STEPS_IN_A_ROW:
                raise ValueError(
                    f"{config.out}: no finite gradient in {bad_in_a_row} steps up to step "
                    f"{training.step}; earlier checkpoints are whole; begin another run with a "
                    "lower optimizer.learning_rate"
                )
            last = training.step == training.steps
            asked = any_rank(accelerator, stop.asked)
            if training.due(config.save_every) or asked or last:
                with log.pause():
                    save_checkpoint(training)
            if config.validation.data is not None and (
                training.due(config.validation.every) or last
            ):
                with log.pause():
                    log.write({"step": training.step, **validate(training)})
            if asked and not last:
                again = "the same command" if config.resume else "the same command with --resume"
                log.say(
                    f"stopped at step {training.step} of {training.steps} with a checkpoint in "
                    f"{config.out}; {again} goes on"
                )
                return False
    return True


def next_batch(training: Training, batches: Iterator[Batch]) -> Batch:
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
            save_checkpoint(training)
        raise TooMuchDamageError(
            f"{error}; --resume with a higher max_bad_fraction goes on, "
            "align inspect --verify names all of them for another run"
        ) from None


def step(training: Training, batch: Batch) -> dict[str, float]:
    """One step of the optimiser; one without a finite gradient is skipped and counted."""
    config, device = training.config, training.accelerator.device
    # Dropout is a function of the step and the rank, so a resumed run draws what it would have.
    torch.manual_seed(
        (config.seed * 1_000_003 + training.step) * 4099 + training.accelerator.process_index
    )
    factor = cosine_factor(
        training.step,
        warmup=round(config.optimizer.warmup * training.steps),
        steps=training.steps,
        floor=config.optimizer.floor,
    )
    set_learning_rate(training.optimizer, factor * config.optimizer.learning_rate)
    texts = training.captions(
        batch.captions, batch.fields, ids=batch.ids.numpy(), epochs=batch.epochs.numpy()
    )
    tokens = training.objective.model.tokenize(texts).to(device)
    labels = positive_labels(batch, config.loss.positives).to(device)

    started = time.perf_counter()
    statistics = [buffer.clone() for buffer in training.objective.buffers()]
    training.wrapped.train()
    images = training_pictures(training, batch)
    output = training.wrapped(images, tokens.ids, tokens.mask, labels)
    training.accelerator.backward(output.loss)
    # Gradients are the same on every process by now, so all decide alike.
    norm = torch.nn.utils.clip_grad_norm_(
        training.objective.parameters(), config.optimizer.max_grad_norm
    ).item()
    derived = time.perf_counter()
    finite = math.isfinite(norm)
    if finite:
        training.optimizer.step()
        if training.average is not None:
            training.average.update_parameters(training.objective)
    else:
        training.skipped += 1
        # The batch has been seen by running statistics too; they forget it.
        for buffer, before in zip(training.objective.buffers(), statistics, strict=True):
            buffer.copy_(before)
    training.optimizer.zero_grad(set_to_none=True)
    training.step += 1
    counts = {"bad": float(training.loader.bad), "cut": float(tokens.truncated)}
    counted = {name: torch.tensor(count, device=device) for name, count in counts.items()}
    metrics = over_ranks(training.accelerator, {**output.metrics, **counted})
    processes = training.accelerator.num_processes
    training.bad_samples = training.earlier_bad + round(metrics.pop("bad") * processes)
    training.cut_captions += round(metrics.pop("cut") * processes)
    return {
        **metrics,
        "learning_rate": factor * config.optimizer.learning_rate,
        "gradient_norm": norm,
        "finite": float(finite),
        "forward_backward_ms": 1000 * (derived - started),
        "optimizer_ms": 1000 * (time.perf_counter() - derived),
    }


def save_checkpoint(training: Training) -> None:
    """Write a whole checkpoint, then forget the oldest beyond what is to be kept."""
    config = training.config
    report = training.data_report()
    if training.accelerator.is_main_process:
        save_state(
            config.out / "checkpoints" / f"step_{training.step:09d}",
            module=training.objective,
            optimizer=training.optimizer,
            average=training.average,
            progress={
                "step": training.step,
                "skipped": training.skipped,
                "loader": {"consumed": training.step * config.batch_size},
                "data": training.fingerprint,
                "data_report": report,
            },
        )
        for old in checkpoints(config.out)[: -config.keep]:
            shutil.rmtree(old)
        run_folder.write_json(config.out / "data_report.json", report)
    training.accelerator.wait_for_everyone()


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
    training.cut_captions = progress["data_report"]["cut_captions"]


def validate(training: Training) -> dict[str, Any]:
    """Recall at 1 both ways on the validation set, by the main process while the others wait."""
    config, figures = training.config, {}
    if training.accelerator.is_main_process:
        report = measure(training)
        training.validated = report if training.step == training.steps else None
        figures = {
            "samples": training.step * config.batch_size,
            **{name: report[name].value for name in _VALIDATION_FIGURES},
        }
    training.accelerator.wait_for_everyone()
    return figures


def measure(training: Training) -> Report:
    """Retrieval both ways on the validation set."""
    config = training.config
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


_VALIDATION_FIGURES = (
    *("image_to_text_recall@1", "image_to_text_recall@5"),
    *("text_to_image_recall@1", "text_to_image_recall@5"),
)


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("pretrain")
