"""From the rates of the stages to the rate of the run: what bounds it, and how long it takes."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil

from pipelines.checkup.report import CheckUp, duration, percent, rate, several
from pipelines.checkup.speed import Rates, Stage
from pipelines.schemas import PretrainConfig
from pipelines.schemas.values import samples_of, unit_of

_RARE = 2 * 3600.0
_BUSY = 0.5
# By how much the cores have to be behind to be what bounds.
_CLEARLY = 1.02
_MUCH = 0.1
_QUICKER = 1.2
_NOTHING = 1e-6
# A forward pass is about a third of a step.
_FORWARD = 1 / 3


@dataclass(frozen=True)
class Machine:
    """What a run has to compute with.

    Attributes:
        cores: Of this machine, as far as this process may use them.
        threads: Of tensor operations, in each process; 1 where they run on a GPU.
        processes: Of the run.
        on_cpu: Whether the model is on the CPU.
        load: Processes that were busy before the check-up began.
    """

    cores: int
    threads: int
    processes: int
    on_cpu: bool
    load: float

    @property
    def share(self) -> float:
        """Cores of each process."""
        return self.cores / self.processes


@dataclass(frozen=True)
class Pace:
    """Seconds per sample of a process in one stage of the run.

    Attributes:
        whole_s: All in all.
        bound: What takes that long.
        waits: Share of that time that goes into loading.
    """

    whole_s: float
    bound: str
    waits: float


def pace_of(stage: Stage, rates: Rates, machine: Machine, *, workers: int) -> Pace:
    """How fast a stage can go: by its turns, by its loader, and by the cores.

    Loading by workers goes on beside the step; without them it takes its turn. Cores are shared:
    `threads` of them are busy while the CPU computes, one while a batch is loaded.
    """
    load = rates.read_s + rates.decode_s
    turns = {
        "tokens": rates.tokenise_s,
        "pictures": stage.augment_s,
        "the step": stage.compute_s,
    }
    work = sum(turns.values())
    busy = load + (work * machine.threads if machine.on_cpu else rates.tokenise_s)
    if workers == 0:
        turns["loading"] = load
        work += load
    slowest = max(turns, key=lambda name: turns[name])
    on_cores = busy / machine.share
    if on_cores > _CLEARLY * max(work, rates.ahead_s if workers else 0):
        return Pace(on_cores, "the cores", load / busy)
    if workers and rates.ahead_s > work:
        return Pace(rates.ahead_s, "loading", 1 - work / rates.ahead_s)
    return Pace(work, slowest, 0.0 if workers else load / work)


def check_speed(
    check: CheckUp,
    config: PretrainConfig,
    rates: Rates,
    machine: Machine,
    *,
    epoch: int,
    validated: int,
) -> None:
    """Tell the rates, what bounds the run, how long it takes and what would make it quicker.

    Args:
        check: Takes the findings.
        config: The run.
        rates: What was measured.
        machine: What it was measured on.
        epoch: Samples in an epoch.
        validated: Samples that each validation reads.
    """
    check.table(_rows(config, rates))
    check.numbers["rates"] = asdict(rates)
    _check_cores(check, config, rates, machine)
    if not any(stage.steps for stage in rates.stages):
        check.ok("forecast", "nothing is left to do")
        return
    paces = [pace_of(stage, rates, machine, workers=config.workers) for stage in rates.stages]
    longest = max(range(len(paces)), key=lambda one: rates.stages[one].steps * paces[one].whole_s)
    _check_bound(check, config, rates, machine, paces[longest])
    _check_length(check, config, rates, machine, paces, epoch, validated)


def _rows(config: PretrainConfig, rates: Rates) -> list[tuple[str, str, str]]:
    rows = [("reading", rates.read_s), ("decoding", rates.decode_s)]
    if config.workers:
        rows.append((f"both, by {several(config.workers, 'worker')}", rates.ahead_s))
    rows.append(("tokens", rates.tokenise_s))
    for stage in rates.stages:
        if stage.augment_s > _NOTHING:
            rows.append((f"pictures to {stage.image_size} px", stage.augment_s))
        rows.append((f"step at {stage.image_size} px", stage.compute_s))
    lines = [(name, rate(seconds), f"{1000 * seconds:.3g}") for name, seconds in rows]
    return [("one process, each stage alone", "samples/s", "ms each"), *lines]


def _check_cores(check: CheckUp, config: PretrainConfig, rates: Rates, machine: Machine) -> None:
    wanted = machine.processes * (machine.threads + config.workers)
    threads = max(1, int(machine.share) - config.workers)
    workers = max(0, int(machine.share) - threads)
    fewer = f"OMP_NUM_THREADS={threads}" if machine.threads > threads else ""
    less = f"workers={workers}" if config.workers > workers else ""
    check.judge(
        wanted <= machine.cores,
        "cores",
        f"{several(machine.processes, 'process')} with {several(machine.threads, 'thread')} and "
        f"{several(config.workers, 'worker')} on {several(machine.cores, 'core')}",
        f"{' and '.join(filter(None, (fewer, less))) or 'fewer processes'}: threads that wait for "
        "a busy core can make a step many times slower",
    )
    if rates.one_thread > _QUICKER:
        check.note(
            "threads",
            f"a step with one thread is {rates.one_thread:.1f} times as fast as with "
            f"{machine.threads}",
            "OMP_NUM_THREADS=1",
        )
    if machine.load > _BUSY * machine.cores:
        check.note(
            "busy",
            f"other programs keep {machine.load:.1f} of {several(machine.cores, 'core')} busy: "
            "what is measured here is less than the machine can do",
            "run this again when they are done",
        )


def _check_bound(
    check: CheckUp, config: PretrainConfig, rates: Rates, machine: Machine, pace: Pace
) -> None:
    load = rates.read_s + rates.decode_s
    text = f"{pace.bound}: {rate(pace.whole_s / machine.processes)} samples/s in all"
    check.numbers["bound"] = pace.bound
    spare = int(machine.share) - machine.threads
    if pace.waits <= _MUCH:
        check.ok("bound", f"{text}; the loader could give {rate(rates.ahead_s)} to each process")
        return
    text += f"; {percent(pace.waits)} of the time goes into waiting for data"
    wanted = ceil(load / max((1 - pace.waits) * pace.whole_s, 1e-9))
    if spare > config.workers:
        advice = [f"workers={min(max(wanted, config.workers + 1), spare)}"]
    else:
        advice = ["no core is left for more workers"]
    median_side = check.numbers.get("median_side", 0)
    decoded = config.augment.decode_size or config.model.image_size
    if median_side >= 2 * decoded:
        advice.append(f"pack the data with resize={ceil(1.25 * decoded)}, decoded far quicker")
    if rates.read_s > rates.decode_s:
        advice.append("bring the shards to a disk of this machine")
    check.note("bound", text, "; ".join(advice))


def _check_length(
    check: CheckUp,
    config: PretrainConfig,
    rates: Rates,
    machine: Machine,
    paces: Sequence[Pace],
    epoch: int,
    validated: int,
) -> None:
    local = config.batch_size / machine.processes
    times = [
        stage.steps * local * pace.whole_s for stage, pace in zip(rates.stages, paces, strict=True)
    ]
    left = sum(stage.steps for stage in rates.stages) * config.batch_size
    load = rates.read_s + rates.decode_s
    once = validated * (load + _FORWARD * rates.stages[-1].compute_s)
    training = sum(times)
    size = config.batch_size
    validating = _seconds_between(config.validation.every, size, epoch, training / left)
    often = int(training // validating) + 1 if validated else 0
    check.numbers["forecast_s"] = {"training": training, "validation": once * often}
    text = f"{left:,} samples take about {duration(training)}"
    if rates.batch < local:
        text += f", told by steps of {rates.batch} samples"
    if len(times) > 1:
        parts = [
            f"{stage.image_size} px {percent(one / training)}"
            for stage, one in zip(rates.stages, times, strict=True)
        ]
        text += f" ({', '.join(parts)})"
    if often:
        text += f"; {often} validations about {duration(once * often)}"
    check.judge(
        once * often <= training,
        "forecast",
        text,
        "a larger validation.every, or fewer samples to validate on",
    )
    saving = _seconds_between(config.save_every, size, epoch, training / left)
    between = min(training, saving)
    check.judge(
        between <= _RARE,
        "saving",
        f"a checkpoint about every {duration(between)}",
        "that much is lost when the machine fails: lower save_every",
    )


def _seconds_between(span: int | str, batch_size: int, epoch: int, sample_s: float) -> float:
    number, unit = unit_of(span)
    if unit == "minutes":
        return 60 * number
    return sample_s * samples_of(span, batch_size=batch_size, epoch=epoch)


def machine_of(*, threads: int, processes: int, on_cpu: bool, load: float) -> Machine:
    """This machine, with a run of so many processes on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Machine(cores or 1, threads if on_cpu else 1, processes, on_cpu, load)
