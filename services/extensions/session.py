"""What a process that trains with others does: its own copy of the base, its share of every batch.

Rank 0 is told what to do and tells the others; it alone answers and writes files.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from services.extensions import errors as translated
from services.extensions.compute import checkpoint
from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.examples import Examples
from services.extensions.compute.settings import TrainSettings
from services.extensions.compute.team import Team
from services.extensions.compute.train import StepReport, Trainer
from services.extensions.course import Standing
from services.extensions.dialogue import Action, Do, Done, Start
from services.kit import errors
from services.residency import gang, sources
from services.residency.checkpoint import CheckpointError
from services.residency.lenses.extension import Extensions
from services.residency.lenses.extension_files import attachable, read_manifest, retrained
from services.residency.lines import Gone
from services.residency.loading import LoadFailed, load_model
from services.residency.memory import is_out_of_memory, keep_freed

KEY = "trained"
ACTIONS: tuple[Action, ...] = get_args(Action)


def run(start: Start, commands: queue.SimpleQueue[Do], send: Callable[[Done | Gone], object]) -> None:
    """Train until the service ends it; whatever is foreseen to go wrong is told as `Gone`."""
    keep_freed()
    try:
        with translated.stored():
            _Member(start, Team(gang.rank(), len(start.ranks)), commands, send).serve()
    except errors.LensmeshError as error:
        send(Gone(error.reason, error.message, error.metadata))
    except (LoadFailed, CheckpointError) as error:
        send(Gone("TRAINING_FAILED", str(error)))
    except (RuntimeError, OSError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        send(Gone("DEVICE_OOM", "the device ran out of memory"))


class _Member:
    def __init__(
        self, start: Start, team: Team, commands: queue.SimpleQueue[Do], send: Callable[[Done | Gone], object]
    ) -> None:
        self._team, self._commands, self._send = team, commands, send
        self._folder, files = Path(start.extension), Path(start.model)
        model = load_model(files, start.quantization, "cpu" if start.ranks[team.rank] == "cpu" else "cuda:0")
        extension = attachable(self._folder, model, base_digest=sources.digest(files))
        self._attached = Extensions()
        self._attached.attach(KEY, extension)
        self._trainer = Trainer(
            model,
            self._attached,
            KEY,
            Examples.load(Path(start.examples)),
            TrainSettings(**start.settings),
            config=ExtensionConfig.from_dict(read_manifest(self._folder).config),
            team=team,
        )
        if start.state:
            checkpoint.load(self._trainer, Path(start.state))

    def serve(self) -> None:
        """Until this process is ended from outside."""
        self._answer(None)
        while True:
            command = self._commands.get() if self._team.rank == 0 else Do("step")
            told = (ACTIONS.index(command.action), command.held_out)
            number, held_out = self._team.told(told, self._trainer.device)
            self._answer(self._done(ACTIONS[int(number)], held_out, Path(command.folder)))

    def _done(self, action: Action, held_out: float, folder: Path) -> StepReport | None:
        if action == "step":
            return self._trainer.step()
        if action == "judged":
            self._trainer.judged(held_out)
        elif action == "settle":
            self._trainer.settle()
        elif action == "state":
            self._write(checkpoint.files(self._trainer), folder)
        else:
            self._write(retrained(self._folder, self._attached[KEY], {}), folder)
        return None

    def _write(self, write: Callable[[Path], Any], folder: Path) -> None:
        if self._team.rank == 0:
            write(folder)

    def _answer(self, report: StepReport | None) -> None:
        if self._team.rank == 0:
            self._send(Done(asdict(Standing.of(self._trainer)), None if report is None else asdict(report)))
