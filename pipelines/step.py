"""One step of training: a batch in, the weights moved once, and what was measured out."""

import math
from functools import partial

import torch

from align.objective import Pairs, StepOutput, derive
from align.optim import constant_factor, cosine_factor, set_learning_rate
from pipelines.captions import positive_labels
from pipelines.config import ConfigError
from pipelines.parallel import clip_gradients, over_ranks
from pipelines.telemetry import Probe
from pipelines.training import Training, training_pictures
from shards.loader import Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def step(training: Training, batch: Batch) -> dict[str, float]:
    """One step of the optimiser; one without a finite gradient is skipped and counted."""
    config, accelerator = training.config, training.accelerator
    rate = learning_rate(training)
    set_learning_rate(training.optimizer, rate)
    pairs, cut = tokenised(training, batch)

    probe = Probe(training)
    ideal = probe.ideal(pairs, dtype=DTYPES[config.precision])
    started = probe.now()
    statistics = [buffer.clone() for buffer in training.objective.model.buffers()]
    training.wrapped.train()
    with probe.watch_loss():
        output = derived_from(training, pairs)
    # Gradients are the same on every process by now, so all decide alike.
    training.scaler.unscale_(training.optimizer)
    norm = clip_gradients(training.objective.parameters(), config.optimizer.max_grad_norm)
    derived = probe.now()
    probe.before_update(norm)
    updating = probe.now()
    finite = math.isfinite(norm)
    training.scaler.step(training.optimizer) if finite else None
    training.scaler.update()
    if finite:
        training.objective.loss.commit()
        if training.average is not None:
            training.average.update_parameters(training.objective)
    else:
        training.skipped += 1
        # The batch has been seen by running statistics too; they forget it.
        for buffer, before in zip(training.objective.model.buffers(), statistics, strict=True):
            buffer.copy_(before)
    training.optimizer.zero_grad(set_to_none=True)
    updated = probe.now()
    training.step += 1
    counts = {"bad": float(training.loader.bad), "cut": float(cut)}
    counted = {
        name: torch.tensor(count, device=accelerator.device) for name, count in counts.items()
    }
    measured = {
        "loss": output.loss,
        "temperature": 1 / training.objective.loss.scale().detach(),
        **({"batch_accuracy": output.batch_accuracy()} if probe.on else {}),
    }
    metrics = over_ranks(accelerator, {**measured, **counted})
    processes = accelerator.num_processes
    training.bad_samples = training.earlier_bad + round(metrics.pop("bad") * processes)
    training.cut_captions += round(metrics.pop("cut") * processes)
    return {
        **metrics,
        "gradient_norm": norm,
        "finite": float(finite),
        **probe.after_update(),
        **probe.clocks(started, derived, updating, updated),
        **ideal,
    }


def derived_from(training: Training, pairs: Pairs) -> StepOutput:
    """The loss of a batch, and its gradients where the optimiser finds them; see `derive`."""
    return derive(
        training.objective,
        [pairs.piece(number, training.pieces) for number in range(training.pieces)],
        seeds=seeds(training),
        wrapped=training.wrapped,
        backward=lambda loss: training.scaler.scale(loss).backward(),
        autocast=partial(precision, training),
        silence=training.spread.silence,
    )


def precision(training: Training) -> torch.autocast:
    """What the towers compute in."""
    dtype = DTYPES[training.config.precision]
    kind = training.accelerator.device.type
    return torch.autocast(kind, dtype, enabled=dtype != torch.float32)


def learning_rate(training: Training) -> float:
    """The learning rate of the step ahead, of groups of rate 1."""
    wanted = training.config.optimizer
    warmup, steps = training.share(wanted.warmup), training.steps
    if wanted.schedule == "constant":
        cooldown = training.share(wanted.cooldown)
        factor = constant_factor(
            training.step, warmup=warmup, steps=steps, cooldown=cooldown, floor=wanted.floor
        )
    else:
        factor = cosine_factor(training.step, warmup=warmup, steps=steps, floor=wanted.floor)
    return factor * wanted.learning_rate


def refuse_long_schedule(training: Training) -> None:
    """Warm-up and cool-down must fit into the run.

    Raises:
        ConfigError: they do not.
    """
    wanted, steps = training.config.optimizer, training.steps
    parts = {"warmup": training.share(wanted.warmup)}
    if wanted.schedule == "constant":
        parts["cooldown"] = training.share(wanted.cooldown)
    if sum(parts.values()) > steps:
        told = " and ".join(f"{name} {number:,}" for name, number in parts.items())
        longer = max(parts, key=parts.__getitem__)
        raise ConfigError(f"optimizer.{longer}: {told} steps are more than the run has ({steps:,})")


def seeds(training: Training) -> list[int]:
    """Of what each piece of this process draws: dropout is a function of the step and the piece.

    Pieces are numbered over all processes, rank by rank and then piece by piece, as the rows of a
    batch are: a resumed run draws what it would have, and so does one that has as many pieces in
    all on another number of processes.
    """
    config, accelerator = training.config, training.accelerator
    base = (config.seed * 1_000_003 + training.step) * 4099
    rank, ranks = accelerator.process_index, accelerator.num_processes
    return [base + rank + ranks * number for number in range(training.pieces)]


def tokenised(training: Training, batch: Batch) -> tuple[Pairs, int]:
    """A batch as the model takes it, on the device, and how many captions were cut."""
    device = training.accelerator.device
    texts = training.captions(
        batch.captions, batch.fields, ids=batch.ids.numpy(), epochs=batch.epochs.numpy()
    )
    tokens = training.objective.model.tokenize(texts, context_length=training.context_length)
    tokens = tokens.to(device)
    labels = positive_labels(batch, training.config.loss.positives)
    pairs = Pairs(
        training_pictures(training, batch),
        tokens.ids,
        tokens.mask,
        labels.to(device),
        batch.ids.to(device),
    )
    return pairs, tokens.truncated
