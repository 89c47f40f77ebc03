"""A finished run whose sequence goes on: `--continue-from RUN` adds the tasks of another data set.

    python -m fastmerge --continue-from runs/x --dataset folder --data-root NEW            # one new task
    python -m fastmerge --continue-from runs/x --dataset folder --data-root NEW --tasks 3

Every method starts from the model that it ended with and from what it kept (`state.safetensors`), so the result has the
bits of one run over all tasks. Settings that are not given are those of RUN. The images of RUN are read again: the
accuracy on its tasks is measured after every new task.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastmerge.checkpoint import load_tensors, select
from fastmerge.config import Config, DataSettings
from fastmerge.data.scenario import Scenario
from fastmerge.errors import UserError
from fastmerge.flags import as_flags, read_flags, resolve
from fastmerge.identity import CONTINUES, differences
from fastmerge.methods import METHODS
from fastmerge.models.backbone import hash_tensors
from fastmerge.models.saved import NAME, read
from fastmerge.results import NUMBER, check, read_json, read_result
from fastmerge.runfolder import STATE, State

if TYPE_CHECKING:
    from fastmerge.methods.method import Method
    from fastmerge.plan import Run
    from fastmerge.training import Learner

# what the kept state of every method depends on; epochs, rates and the like may change from task to task
SAME = (
    "model.model",
    "model.head",
    "training.lora_rank",
    "training.prompt_length",
    "training.init_rule",
    "training.deploy_rule",
)
TEXT_GROUPS = {group for method in METHODS.values() if method.needs_text for group in method.groups}
CONTENTS = ("starting weights", "text tower", "normalisation")
NEEDED = {"bad_images": NUMBER, "bytes_written": NUMBER, "peak_memory_bytes_per_task": [NUMBER], "kept_bytes": [NUMBER]}


class Earlier:
    """A finished run folder. config: of its last command. scenario: its tasks, once `follow` has checked them.

    Raises:
        UserError: it is not the folder of finished runs.
    """

    scenario: Scenario

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if not list(self.path.glob("*-seed*/result.json")):
            raise UserError(
                f"--continue-from {path}: no finished run there; expected a run folder such as runs/glyphs-cil5-tiny"
            )
        values = read_json(self.path / "config.json", "the config.json of a run")
        source = str(self.path / "config.json")
        self.config: Config = resolve(read_flags(as_flags(values, source)))
        self.manifest: dict[str, Any] = read_json(self.path / "manifest.json", "the manifest.json of a run")
        check(self.manifest, {"determines": {"settings": {}, "contents": {}, "runs": {}}}, self.path / "manifest.json")

    def has_none_of(self, config: Config) -> None:
        """Raise UserError if a data set that is to be a new task is one of this run or of those before it, from the same
        folder."""
        known = self.data_sets()
        if again := [(name, known[name, root]) for name, root in places(config.data) if (name, root) in known]:
            names, path = [name for name, _ in again], again[0][1]
            raise UserError(
                f"--dataset: {', '.join(names)} {'is a task' if len(names) == 1 else 'are tasks'} of {path}, which "
                "--continue-from keeps; name the new data sets only"
            )

    def data_sets(self) -> dict[tuple[str, str], Path]:
        """The data sets of this run and of those before it, as `places` names them, and the run of each."""
        before = self.config.run.continue_from
        earlier = Earlier(before).data_sets() if before else {}
        return earlier | dict.fromkeys(places(self.config.data), self.path)

    def follow(self, own: Scenario, new: Scenario) -> Scenario:
        """The tasks of this run, then those of `new`. own: what its settings make of its data now.

        Raises:
            UserError: its data changed, or the scenarios are of two kinds.
        """
        now = json.loads(json.dumps(own.manifest()))
        names = ("sha256", "images_sha256", "order_sha256", "classes", "tasks")
        if changed := [name for name in names if now[name] != self.manifest.get(name)]:
            raise UserError(
                f"--continue-from {self.path}: the data of its tasks changed ({', '.join(changed)} in its manifest.json). "
                "The accuracy on these tasks is measured again, so it needs the same images"
            )
        if own.kind != new.kind:
            raise UserError(f"--scenario {new.kind}: {self.path} is {own.kind}, and one sequence has one kind of tasks")
        self.scenario = own
        return own.followed_by(new)

    def check(self, determined: dict[str, dict[str, Any]]) -> None:
        """Raise UserError if a run has no earlier one here, or another model or method; determined: of `identity`."""
        old = self.manifest["determines"]
        if missing := [name for name in determined["runs"] if not (self.path / name / "result.json").exists()]:
            there = ", ".join(sorted(file.parent.name for file in self.path.glob("*-seed*/result.json")))
            raise UserError(
                f"--continue-from {self.path}: no finished run {missing[0]} there; there are: {there}. Choose with --method, "
                "--protocol and --seeds"
            )

        def part(values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
            return {
                "settings": {name: values["settings"].get(name) for name in SAME},
                "contents": {name: values["contents"].get(name) for name in CONTENTS},
                "runs": {
                    name: {key: v for key, v in values["runs"].get(name, {}).items() if not key.startswith("training.")}
                    for name in determined["runs"]
                },
            }

        new = part(determined)
        for values in new["runs"].values():
            values.pop(CONTINUES, None)
        if changed := differences(part(old), new):
            raise UserError(
                f"--continue-from {self.path}: its runs have another model or method:\n  " + "\n  ".join(changed)
            )

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors of the model, and what the method kept."""
        tensors, about = read(self.path / name / NAME)
        file = self.path / name / STATE
        kept = load_tensors(file)[0] if file.exists() else {}
        if not isinstance(about.get("kept"), list) or set(about["kept"]) - kept.keys():
            raise UserError(
                f"{file}: what the method continues with is missing (the file was deleted, or an older fastmerge made this "
                "run); delete the folder and run its command again"
            )
        return tensors, kept

    def text_head(self) -> dict[str, Tensor] | None:
        """The state of the text head as it was made; None if all runs have another head, or learned its rows."""
        for file in sorted(self.path.glob(f"*-seed*/{NAME}")):
            tensors, about = read(file)
            settings = self.manifest["determines"]["runs"].get(file.parent.name, {})
            learned = {name.partition(".")[0] for name in settings} & TEXT_GROUPS
            if about["head"] == "text" and not learned:
                made = select(tensors, "head")
                return {name: made[name] for name in ("weight", "scale")}  # a method may add its own
        return None

    def digest(self, name: str) -> str:
        """sha256 of all that the run `name` continues with."""
        model, kept = self._read(name)
        return hashlib.sha256((hash_tensors(model) + hash_tensors(kept)).encode()).hexdigest()

    def start(self, run: Run, learner: Learner, method: Method) -> State:
        """Set learner and method to where the earlier run ended; return the position and the results so far.

        Raises:
            UserError: the run's files are missing, damaged, or lack something.
        """
        name, folder = run.folder, self.path / run.folder
        model, kept = self._read(name)
        result = read_result(folder / "result.json")
        check(result, NEEDED, folder / "result.json")
        learner.backbone.load_state_dict(select(model, "backbone"))
        learner.head.adopt(select(model, "head"))
        learner.head.to(learner.device)
        method.load_state_dict({key: tensor.to(learner.device) for key, tensor in kept.items()})
        added: list[float | None] = [None] * (len(run.scenario.tasks) - len(result["accuracy_matrix"]))

        def wider(matrix: list[list[float | None]]) -> list[list[float | None]]:
            return [row + added for row in matrix]

        return State(
            task=len(result["accuracy_matrix"]),
            matrix=wider(result["accuracy_matrix"]),
            also={key: wider(values["accuracy_matrix"]) for key, values in result["also"].items()},
            kept_bytes=result["kept_bytes"],
            peak_memory_bytes=result["peak_memory_bytes_per_task"],
            test_counts=result["test_counts"],
            before=result.get("before_training", []),
            retained=result.get("retained", []),
            bad_images=result["bad_images"],
            seconds=result["seconds"],
            bytes_written=result["bytes_written"],
        )


def places(data: DataSettings) -> list[tuple[str, str]]:
    """The data sets by name and folder."""
    roots = [os.path.realpath(os.path.expanduser(root)) for root in data.data_root or ("",)]
    return list(zip(data.dataset, roots * len(data.dataset) if len(roots) == 1 else roots, strict=False))
