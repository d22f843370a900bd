"""`align doctor CONFIG`: what a training run would meet, found in seconds instead of hours.

It takes exactly what `align pretrain` takes, and a few keys of its own. Samples of every shard are
read and decoded, the model is built, and every stage is timed on the real data; nothing is written
into the run folder. Leaves with 0 when nothing would fail and with 3 when something would; notes,
which tell what would make the run slow or poor, do not count.
"""

import os
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from align.tokenizer import Tokenizer
from align.tokenizer_source import tokenizer_of
from pipelines.captions import CaptionWriter
from pipelines.checkup.data import (
    Look,
    check_captions,
    check_pictures,
    check_samples,
    check_tokens,
    check_validation,
    look,
    sampled,
)
from pipelines.checkup.fit import check_disk, check_order, check_out, check_weights
from pipelines.checkup.forecast import check_speed, machine_of
from pipelines.checkup.memory import Memory, check_memory, free_memory, resident, weigh
from pipelines.checkup.report import CheckUp, Mark, several
from pipelines.checkup.speed import measure
from pipelines.config import ConfigError
from pipelines.parallel import refuse_unfit_for_shares, statistics_of_pieces
from pipelines.pretrain import resume
from pipelines.schemas import DoctorConfig, PretrainConfig
from pipelines.starting import Start, starting
from pipelines.step import refuse_long_schedule
from pipelines.telemetry import refuse_missing_trackers
from pipelines.training import (
    Training,
    assemble,
    make_augment,
    make_loader,
    make_tokenizer,
    open_sources,
)
from pipelines.validation import Validation
from shards.captions import CaptionRule
from shards.loader import ShardLoader, Source

WOULD_FAIL = 3
"""Exit code where something would end the run."""


def run(config: DoctorConfig) -> int:
    """Look at everything, print it, and tell by the exit code whether the run would fail."""
    busy = os.getloadavg()[0]
    wanted = config.run
    accelerator = Accelerator(mixed_precision="no")
    if accelerator.num_processes > 1:
        raise ConfigError(
            "run doctor as one process and tell it how many there will be: processes=N"
        )
    check = CheckUp(quiet=config.output == "json")
    check.begin("run")
    start = None
    with check.trying("start_from"):
        wanted, start = starting(wanted)
    can_start = wanted.start_from is None or start is not None
    visit = _Visit(config, wanted, accelerator, check, resident(), start)
    with check.trying("trackers"):
        refuse_missing_trackers(wanted)
    with check.trying("shares"):
        if wanted.shard_weights and config.processes > 1:
            refuse_unfit_for_shares(wanted)
    check_out(check, wanted)
    data = visit.data()
    if data is not None and can_start:
        training = visit.model(data)
        if training is not None:
            visit.measurements(training, data, busy)
    check.end()
    if check.quiet:
        print(check.as_json())
    return WOULD_FAIL if check.count(Mark.PROBLEM) else 0


@dataclass
class _Data:
    """The data of a run, opened and looked at."""

    sources: list[Source]
    loader: ShardLoader
    look: Look
    writer: CaptionWriter
    texts: list[str]
    validated: int = 0


@dataclass
class _Visit:
    """One check-up, part by part; each part needs the one before."""

    config: DoctorConfig
    wanted: PretrainConfig
    accelerator: Accelerator
    check: CheckUp
    program: int
    start: Start | None = None

    def data(self) -> _Data | None:
        """Open the data and look at samples of it; None where nothing can be learnt from it."""
        check, wanted = self.check, self.wanted
        check.begin("data")
        with check.trying("data"):
            sources = open_sources(wanted)
            loader = make_loader(wanted, sources, self.accelerator)
            manifest = loader.manifest
            self.program = resident()
            rule = CaptionRule(tuple(wanted.caption_fields))
            found = look(manifest, rule, shards=self.config.shards, seconds=self.config.seconds)
            check_samples(check, wanted, found)
            check_order(
                check,
                wanted,
                samples=len(manifest),
                shards=len(manifest.shards),
                processes=self.config.processes,
            )
            writer = CaptionWriter(wanted.captions, seed=wanted.seed)
            data = _Data(sources, loader, found, writer, [])
            with check.trying("validation"):
                data.validated = check_validation(check, wanted, manifest)
            if not found.seen:
                return None
            check_pictures(check, wanted, found)
            with check.trying("captions"):
                data.texts = check_captions(check, wanted, found, writer)
                return data
        return None

    def model(self, data: _Data) -> Training | None:
        """Build what the run would build, and go on from its checkpoint where that is asked for."""
        check, wanted = self.check, self.wanted
        check.begin("model")
        augment = tokenizer = None
        with check.trying("augment"):
            augment = make_augment(wanted)
        with check.trying("tokenizer"):
            tokenizer = self._tokenizer(data)
            check_tokens(check, wanted, tokenizer, data.texts)
        if tokenizer is None:
            return None
        with check.trying("model"):
            training = assemble(
                wanted,
                self.accelerator,
                loader=data.loader,
                augment=augment,
                captions=data.writer,
                tokenizer=tokenizer,
                start=self.start,
            )
            if wanted.resume:
                resume(training)
            with check.trying("schedule"):
                refuse_long_schedule(training)
            check_weights(check, training)
            processes = self.config.processes
            if line := statistics_of_pieces(training.objective, wanted, processes=processes):
                found, _, advice = line.removeprefix("note: ").partition("; ")
                check.note("pieces", found, advice)
            if wanted.validation.tasks or wanted.validation.best:
                with check.trying("validation"):
                    Validation(training)
            return training
        return None

    def _tokenizer(self, data: _Data) -> Tokenizer:
        """The run's tokenizer; one that is trained gets a bounded number of captions."""
        if self.start is not None:
            return self.start.tokenizer
        some, began = sampled(data.loader.manifest), time.perf_counter()
        tokenizer = make_tokenizer(self.wanted, some, data.writer)
        text = self.wanted.model.text
        trains = not (self.wanted.tokenizer.name or tokenizer_of(text.name, text.options))
        if trains and len(some) < len(data.loader.manifest):
            self.check.ok(
                "vocabulary",
                f"trained on {several(len(some), 'sample')} here in "
                f"{time.perf_counter() - began:.0f} s; the run takes up to a million",
            )
        return tokenizer

    def measurements(self, training: Training, data: _Data, busy: float) -> None:
        """Time every stage, and find out what the run takes of time, memory and disk."""
        check, wanted, processes = self.check, self.wanted, self.config.processes
        device = self.accelerator.device
        check.begin("speed")
        local = max(1, wanted.batch_size // processes)
        with check.trying("step"):
            rates = measure(
                training,
                data.sources,
                local_batch=local,
                free=free_memory(device),
                seconds=self.config.seconds,
            )
            if not rates.finite:
                check.problem(
                    "step",
                    "the first steps have no finite gradient",
                    "lower optimizer.learning_rate, or precision=fp32",
                )
            machine = machine_of(
                threads=torch.get_num_threads(),
                processes=processes,
                on_cpu=device.type == "cpu",
                load=busy,
            )
            check_speed(
                check,
                wanted,
                rates,
                machine,
                epoch=training.loader.num_samples,
                validated=data.validated,
            )
            check.begin("memory and disk")
            weights = weigh(training)
            side = wanted.augment.decode_size or wanted.model.image_size
            batches = 2 * wanted.workers + 2
            piece = min(wanted.micro_batch_size or local, local)
            sharded = wanted.shard_weights and processes > 1
            memory = Memory(
                weights=weights.shared_by(processes, whole_gradients=piece < local)
                if sharded
                else weights,
                activations=rates.activations,
                waiting=batches * local * 3 * side * side,
                program=self.program,
            )
            check_memory(check, memory, device=device, processes=processes, batch=piece)
            check_disk(check, wanted, weights)


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("doctor")
