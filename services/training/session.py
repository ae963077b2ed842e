"""What the training process does between its first line and its last."""

from __future__ import annotations

import math
import queue
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.kit import errors
from services.residency.lines import Gone
from services.residency.memory import is_out_of_memory, keep_freed
from services.residency.shards import CorruptCache
from services.training import state_files
from services.training.cache_rows import CacheRows
from services.training.compute.coder import Coder, NonFiniteLoss
from services.training.compute.config import ConfigError, TrainConfig
from services.training.compute.initial import SAMPLE_ROWS
from services.training.compute.ranks import Ranks
from services.training.compute.report import StepReport
from services.training.compute.trainer import CoderPlan, State, Trainer, coders_of
from services.training.dialogue import (
    Command,
    Finished,
    Judge,
    Live,
    Message,
    Progress,
    Save,
    Saved,
    Split,
    Start,
    Write,
    Written,
)
from services.training.domain import Plan

if TYPE_CHECKING:
    from services.training.live_rows import LiveSource
    from services.training.split_rows import SplitRows

LAST_BATCHES: Final = 20
"""Batches that `train_fvu` is the mean of."""
TELL_PERCENT: Final = 0.5
TELL_SECONDS: Final = 5.0
QUIET_SECONDS: Final = 0.2
"""Progress is told after so many percent or seconds, and not more often than every QUIET_SECONDS."""


def run(start: Start | Judge, commands: queue.SimpleQueue[Command], send: Callable[[Message], object]) -> None:
    """Train, make transcoders of a checkpoint, or evaluate; whatever is foreseen to go wrong is told as `Gone`."""
    keep_freed()
    ranks = Ranks.joined()
    try:
        if isinstance(start, Judge):  # what runs models is of no use to a training from a cache
            import_module("services.training.judgements").judge(start, send)
        else:
            _Session(start, commands, send, ranks).run()
    except NonFiniteLoss as error:
        if ranks.rank == 0:  # it happens to all of them
            facts = {"coder": error.coder, "step": error.step, **error.facts}
            send(Gone("NON_FINITE_LOSS", str(error), {name: _json(value) for name, value in facts.items()}))
    except CorruptCache as error:
        send(Gone("CHECKSUM_MISMATCH", str(error), {"file": error.file, "problem": error.problem}))
    except ConfigError as error:
        send(Gone("VALIDATION_ERROR", str(error)))
    except errors.Unavailable:
        raise  # nobody gave rows for long: to die is to be tried again
    except errors.LensmeshError as error:
        send(Gone(error.reason, error.message, dict(error.metadata)))
    except ValueError as error:
        send(Gone("TRAINING_FAILED", str(error)))
    except (RuntimeError, OSError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        send(Gone("DEVICE_OOM", "the device ran out of memory"))


class _Session:
    """Of a gang every rank makes every step; rank 0 alone tells, saves and writes."""

    def __init__(
        self,
        start: Start,
        commands: queue.SimpleQueue[Command],
        send: Callable[[Message], object],
        ranks: Ranks,
    ) -> None:
        self._start, self._commands, self._send, self._ranks = start, commands, send, ranks
        self._plan = Plan.from_json(start.plan)
        self._recent: dict[str, deque[float]] = {}
        self._told_at, self._told_step = time.monotonic(), 0

    def run(self) -> None:
        """From the start, or from a checkpoint."""
        state: State | None = None
        recent: dict[str, list[float]] = {}
        if self._start.state:
            state, extra = state_files.read(Path(self._start.state))
            recent = extra["recent_fvu"]
        self._recent = {coder.name: deque(recent.get(coder.name, ()), LAST_BATCHES) for coder in self._plan.coders}
        if self._start.cache or self._start.live or self._start.split:
            self._train(state)
        elif state is not None:
            self._finish(coders_of(state))

    def _train(self, state: State | None) -> None:
        pairs = {coder.pair: (coder.source, coder.target) for coder in self._plan.coders}
        plans = {coder.name: CoderPlan(coder.pair, TrainConfig(**coder.config)) for coder in self._plan.coders}
        source, config = self._source(pairs), next(iter(plans.values())).config
        rows = min(source.rows, SAMPLE_ROWS)
        try:
            trainer = Trainer(source, plans, self._start.device, state, self._ranks)
            rows = trainer.batch_size
            self._steps(trainer)
        except NonFiniteLoss as error:
            position = error.step * config.batch_size
            error.facts |= source.facts_of(plans[error.coder].pair, rows, config.seed, position)
            raise

    def _source(self, pairs: Mapping[str, tuple[str, str]]) -> CacheRows | LiveSource | SplitRows:
        """What the other sources import is of no use to one: gRPC and the protos, or transformers."""
        if self._start.live is not None:
            live: LiveSource = import_module("services.training.live_rows").LiveSource(Live(**self._start.live), pairs)
            return live
        if self._start.split is not None:
            split_rows, split = import_module("services.training.split_rows"), Split(**self._start.split)
            own: SplitRows = split_rows.SplitRows(split, pairs, self._start.device)
            return own
        return CacheRows(Path(self._start.cache), pairs)

    def _steps(self, trainer: Trainer) -> None:
        self._told_step = trainer.step_count
        for reports in trainer.run():
            if self._ranks.rank:
                continue
            for report in reports:
                self._recent[report.coder].append(report.fvu)
            self._tell(trainer, reports)
            while not self._commands.empty():
                self._save(self._commands.get(), trainer)
        if self._ranks.rank == 0:
            self._finish(trainer.coders)

    def _tell(self, trainer: Trainer, reports: Sequence[StepReport]) -> None:
        now, done = time.monotonic(), trainer.step_count
        waited, steps = now - self._told_at, done - self._told_step
        far = steps >= trainer.steps * TELL_PERCENT / 100 or waited >= TELL_SECONDS
        if done < trainer.steps and (not far or waited < QUIET_SECONDS):
            return
        rate = steps * trainer.batch_size / waited
        left = (trainer.steps - done) * trainer.batch_size / rate
        figures = [report.to_dict() for report in reports]
        self._send(Progress(done, done * trainer.batch_size, rate, left, figures))
        self._told_at, self._told_step = now, done

    def _save(self, command: Command, trainer: Trainer) -> None:
        assert isinstance(command, Save), "before its end a training is asked for checkpoints only"
        recent = {name: list(values) for name, values in self._recent.items()}
        state_files.write(Path(command.folder), trainer.state(), {"recent_fvu": recent})
        last = [values[-1] for values in self._recent.values()]
        self._send(Saved(trainer.step_count, trainer.step_count * trainer.batch_size, sum(last) / len(last)))

    def _finish(self, coders: Sequence[Coder]) -> None:
        step = coders[0].step_count
        fvu = {name: sum(values) / len(values) for name, values in self._recent.items()}
        self._send(Finished(step, step * coders[0].config.batch_size, fvu))
        command = self._commands.get()
        while isinstance(command, Save):  # asked for before the end was known; too late to be of use
            command = self._commands.get()
        assert isinstance(command, Write), "after its end a training is asked for transcoders"
        widths = {}
        for coder in coders:
            transcoder = coder.transcoder(dict(command.infos[coder.name]))
            transcoder.save(command.folders[coder.name])
            widths[coder.name] = (transcoder.d_in, transcoder.d_out)
        self._send(Written(widths))


def _json(value: object) -> object:
    """JSON has no word for a number that is not finite."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
