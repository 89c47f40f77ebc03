"""The main loop: for every task train, merge, evaluate, record and save.

A run can be stopped at any step and continues from its checkpoint with the same bits. A checkpoint holds the state of
the learner, the method and the current phase, the tensors of the current task, and the position in the run. Every
random choice is a function of the seed and the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from fastmerge.checkpoint import joined, resident, select
from fastmerge.config import Config
from fastmerge.console import Console
from fastmerge.data.cache import ImageCache, TaskImages
from fastmerge.data.scenario import Scenario, Task
from fastmerge.errors import UserError
from fastmerge.evaluate import Matrix, accuracies, accuracies_within, micro
from fastmerge.machine import PeakMemory
from fastmerge.methods.method import Method, Tensors
from fastmerge.models.saved import model_tensors, recipe
from fastmerge.parts import OutOfMemory
from fastmerge.ranks import ranks
from fastmerge.runfolder import Interrupted, Record, State, StopRequest
from fastmerge.training import PHASES, Learner, Phase
from fastmerge.transfer import Retained, speaks
from fastmerge.wording import counted


class Images:
    """The scenario's images on the device: the training images of the current task, and the test images."""

    def __init__(self, scenario: Scenario, cache: ImageCache):
        self.scenario, self.cache = scenario, cache

    def train(self, task: Task) -> TaskImages:
        images = self.cache.get(self.scenario.dataset.train, task.train, keep=False)
        if task.index + 1 < len(self.scenario.tasks):  # decoded while this task trains
            self.cache.prefetch(self.scenario.dataset.train, self.scenario.tasks[task.index + 1].train)
        return images

    def tests(self, after: int) -> list[TaskImages]:
        """Test images to evaluate after task `after`: of the tasks seen so far (cil) or of all domains (dil)."""
        tasks = self.scenario.tasks if self.scenario.kind == "dil" else self.scenario.tasks[: after + 1]
        return [self.cache.get(self.scenario.dataset.test, task.test, keep=True) for task in tasks]

    def before(
        self, learner: Learner, method: Method, task: Task, tick: Callable[[int], None], matrix: Matrix
    ) -> float | None:
        """Accuracy on the test images of a task that is not trained yet, None for the first; matrix: so far. It has the
        accuracy already where all domains were evaluated with the same candidates."""
        if not task.index or not speaks(learner, method):
            return None
        old, new = (candidates(self.scenario, learner.config, after) for after in (task.index - 1, task.index))
        if list(old) == list(new) and (known := matrix[task.index - 1][task.index]) is not None:
            return known
        images = self.cache.get(self.scenario.dataset.test, task.test, keep=True)
        return accuracies(learner, [images], new, tick, method.features())[0]


def learn(
    learner: Learner,
    method: Method,
    scenario: Scenario,
    images: Images,
    record: Record,
    console: Console,
    start: Callable[[], State] | None = None,
    retained: Retained | None = None,
) -> State:
    """Learn all tasks of the scenario, starting from the position saved in `record`. Return the final state.

    start: sets learner and method to where an earlier run ended, if nothing is saved. retained: of `--retain`.

    Raises:
        Interrupted: a signal arrived; the run can be continued.
        UserError: a loss, weight or logit is not finite, an image is unreadable, a file cannot be written; the last
            checkpoint is valid.
    """
    state, saved = record.open()
    during: Tensors = {}  # tensors of the current task
    if saved:
        during = {name: tensor.to(learner.device) for name, tensor in select(saved, "during").items()}
        learner.load_state_dict(select(saved, "learner"))
        method.load_state_dict(select(saved, "method"))
    elif start is not None:
        state = start()
    learner.parts.sizes, learner.parts.say = state.parts, console.line
    learner.test_images = lambda task: images.tests(task)[task]
    memory = PeakMemory(learner.device)
    console.begin(state)

    def save(phase_tensors: dict[str, torch.Tensor]) -> None:
        parts = {"learner": learner.state_dict(), "method": method.state_dict()}
        parts |= {"during": during, "phase": phase_tensors}
        record.save(state, joined(**parts))

    def save_if_due(phase: Phase | None = None) -> None:
        """Save if `--save-every` seconds have passed since the last time (repeating less costs less than saving). After a
        signal save and stop."""
        if record.due():
            stop = StopRequest.signal is not None  # a signal that arrives while saving waits until the next time
            save(phase.tensors() if phase else {})
            if stop:
                raise Interrupted

    def tick(evaluated: int) -> None:
        console.evaluated(scenario.tasks[state.task], evaluated)
        if ranks().any(StopRequest.signal is not None):
            save_if_due()  # evaluation does not change the state in a checkpoint

    for task in scenario.tasks[state.task :]:
        memory.reset()
        if state.phase < len(PHASES):
            train_images = images.train(task)
            if (state.phase, state.step) == (0, 0):
                began = time.perf_counter()
                state.before += [None] * (task.index - len(state.before))  # of tasks before this was measured
                if len(state.before) == task.index:
                    state.before.append(images.before(learner, method, task, tick, state.matrix))
                state.seconds["evaluate"] += time.perf_counter() - began
                learner.grow_head(task, train_images)
                during = method.begin(task)
                state.bad_images += train_images.skipped
                for text in skipped(scenario, task, train_images):
                    console.line(text, style="yellow")
            phases = list(zip(PHASES, (method.train, method.merge), strict=True))
            for number, (name, make) in list(enumerate(phases))[state.phase :]:
                began = time.perf_counter()
                phase = make(task, train_images, during)
                if phase is not None:
                    if state.step:
                        phase.load(select(saved, "phase"))
                    for i in range(state.step, phase.steps):
                        try:
                            # several processes cannot repeat a step, whose sums the others have taken part in
                            terms = learner.parts.attempt(partial(phase.step, i), again=learner.ranks.size == 1)
                        except OutOfMemory as error:
                            # Step i is the next one. Before the first, a phase has no tensors that it could begin with.
                            # Of several processes the others cannot save with this one.
                            if i and not error.changed and learner.ranks.size == 1:
                                save(phase.tensors())
                            raise
                        record.log({"task": task.index, "phase": name, "step": i}, terms)
                        console.step(task, name, i, phase, terms)
                        state.step, now = i + 1, time.perf_counter()
                        state.seconds[name] += now - began
                        began = now
                        save_if_due(phase)
                    phase.finish()
                    state.seconds[name] += phase.seconds_elsewhere
                    state.bytes_written += phase.bytes_written
                state.seconds[name] += time.perf_counter() - began
                if number == len(PHASES) - 1:
                    during.clear()
                phase, saved = None, {}
                record.flush()  # a loss that is not finite is a better message than the weights
                learner.ranks.check_same(learner.theta)
                check_finite(joined(learner=learner.state_dict(), method=method.state_dict()), task, name, record)
                state.phase, state.step = number + 1, 0
                save_if_due()

        began = time.perf_counter()
        tests = images.tests(task.index)
        classes = candidates(scenario, learner.config, task.index)
        features = method.features()
        own = own_classes(scenario, len(tests))
        row, within = accuracies_within(learner, tests, classes, own, tick, features)
        others = {OWN: within} if own else {}
        others |= {
            name: accuracies(learner, tests, classes, tick, other) for name, other in method.also_evaluated().items()
        }
        if retained is not None:
            kept = retained.accuracy(learner, method, images.cache, tick)
        # nothing stops the run from here to the save, so the state belongs to this task or to the next one
        unseen: list[float | None] = [None] * (len(scenario.tasks) - len(row))
        state.matrix.append(row + unseen)
        if retained is not None:
            state.retained += [*[None] * (task.index - len(state.retained)), kept]
        for name, values in others.items():
            state.also.setdefault(name, []).append(values + unseen)
        state.seconds["evaluate"] += time.perf_counter() - began
        state.test_counts = [len(t) for t in tests]  # without unreadable images
        state.bad_images += tests[task.index].skipped
        if tests[task.index].skipped:
            console.line(f"{task.name}: {_left_out(tests[task.index], 'test')}", style="yellow")
        state.kept_bytes.append(kept_bytes(learner, method))
        state.peak_memory_bytes.append(memory.read())
        state.task, state.phase = task.index + 1, 0
        summary = {"accuracy": row, "seen_accuracy": micro(row[: task.index + 1], state.test_counts)}
        record.task({"task": task.index, "phase": "evaluate", "seen_accuracy": summary["seen_accuracy"]})
        if learner.config.training.keep_models:
            about = {"method": record.folder.name, "seed": learner.seed, "final_accuracy": summary["seen_accuracy"]}
            about = recipe(learner, features, scenario, task.index, **about)
            model = model_tensors(learner.backbone, learner.head, features)
            state.bytes_written += record.keep(task.index, model, about)
        if state.task < len(scenario.tasks):  # after the last task the model is written instead
            save_if_due()
        console.task_done(task, summary, state)
    return state


def candidates(scenario: Scenario, config: Config, after: int) -> Sequence[int]:
    """The candidate classes at test time after task `after`."""
    return range(len(scenario.dataset.class_names)) if config.scenario.eval_classes == "all" else scenario.seen(after)


OWN = "own classes"


def own_classes(scenario: Scenario, tests: int) -> list[tuple[int, ...]] | None:
    """The classes of each of the first `tests` tasks where every task is a data set of its own; else None."""
    several = scenario.kind == "datasets" and len(scenario.tasks) > 1
    return [task.classes for task in scenario.tasks[:tests]] if several else None


def skipped(scenario: Scenario, task: Task, images: TaskImages) -> list[str]:
    """Lines about the training images that `--skip-bad-images` left out, and the classes that have none left."""
    if not images.skipped:
        return []
    labels = scenario.dataset.train.labels[task.train]
    gone = sorted(set(labels.tolist()) - set(images.labels.tolist()))
    names = ", ".join(scenario.dataset.class_names[c] for c in gone[:5]) + (
        f" and {len(gone) - 5} more" * (len(gone) > 5)
    )
    lines = [f"{task.name}: {_left_out(images, 'training')}"]
    if gone:
        lines.append(f"warning: {task.name}: no training image is left of class {names}, so the model cannot learn it")
    return lines


def _left_out(images: TaskImages, part: str) -> str:
    are = "is" if images.skipped == 1 else "are"
    return f"{images.skipped} of {counted(images.skipped + len(images), f'{part} image')} cannot be read and {are} left out"


def check_finite(tensors: Tensors, task: Task, phase: str, record: Record) -> None:
    """Raise UserError if the model, or what the method keeps, has values that are not finite."""
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise UserError(
            f"{task.name}, phase {phase}: the model has values that are not finite ({', '.join(bad[:3])}). Any "
            f"checkpoint in {record.folder} is valid; try a smaller learning rate or merge factor with another --run-dir"
        )


def kept_bytes(learner: Learner, method: Method) -> int:
    """Bytes kept from task to task: the learner's model and head, and the method's state."""
    return learner.frozen_bytes + resident(learner.state_dict()) + resident(method.state_dict())
