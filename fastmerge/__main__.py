"""The command line: read the flags, run every method and seed, print a table.

    python -m fastmerge                                                     # built-in glyphs and tiny CLIP, no download
    python -m fastmerge --dataset imagenet1k --tasks 100 --data-root DIR    # the main job
    python -m fastmerge --method trm finetune --seeds 0 1 2                 # one comparison table

Exit codes: 0 done, 2 bad input (the message says what to do), 130 or 143 stopped by a signal (the same command
continues the run).
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Sequence
from typing import Any

from fastmerge.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    from fastmerge.flags import parse

    try:
        return run(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        gc.unfreeze()  # `run` froze objects; without this, extension modules report leaks at exit


def run(config: Any) -> int:
    """Prepare, run every method and seed, and report. Return the exit code."""
    # imported here so that --help and flag errors appear at once
    from fastmerge.checkpoint import save_json, save_text
    from fastmerge.config import to_dict
    from fastmerge.console import Console
    from fastmerge.evaluate import metrics, zero_shot
    from fastmerge.loop import Images, candidates, learn
    from fastmerge.machine import environment
    from fastmerge.methods import METHODS
    from fastmerge.methods.trajectory import Trajectory
    from fastmerge.models.saved import model_tensors
    from fastmerge.plan import plan, read_method, shared_trainings
    from fastmerge.plots import draw
    from fastmerge.report import (
        comparison,
        header,
        results_markdown,
        results_rows,
        results_table,
        single_class_warning,
        summary,
        warmup_warning,
    )
    from fastmerge.runfolder import Interrupted, RunFolder, StopRequest
    from fastmerge.setup import Setup

    gc.collect()
    gc.freeze()  # imported objects stay alive; otherwise the collection before every task spends 0.3 s on them

    console = Console(config.run.quiet)
    for spec in config.training.method:
        read_method(spec, config)  # reports a wrong name before any data is read
    setup = Setup(config, console.encoding)
    config, scenario, cache, seeds = setup.config, setup.scenario, setup.cache, config.training.seeds
    runs = plan(config, scenario)
    for run in runs:  # before anything is trained or written
        METHODS[run.method].check(run.config, setup.backbone)
    manifest = scenario.manifest() | {
        "weights": setup.backbone.weights,
        "weights_sha256": setup.backbone.weights_sha256,
    }
    folder = RunFolder(config, environment(setup.device), manifest)
    for text in header(setup, manifest, folder):
        console.line(text)
    for text in manifest["warnings"]:
        console.line(f"note: {text}", style="yellow")
    if setup.random_weights:
        console.line("warning: --pretrained none: the backbone starts from random weights", style="yellow")
    trained = [run.scenario for run in runs if METHODS[run.method].trains]
    for warning in (warmup_warning(scenario, config.training), single_class_warning(trained)):
        if warning is not None:
            console.line(f"warning: {warning}", style="yellow")

    results: dict[str, dict[str, Any]] = {run.label: {} for run in runs}
    share = shared_trainings(runs, config.training.keep_trajectory)
    trajectories = {seed: Trajectory(folder.path / f"trajectory-seed{seed}", share) for seed in seeds}
    starting: dict[str, Any] | None = None
    previous = {s: signal.signal(s, request_stop(console)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        records = [folder.record(run.label, run.seed, config.run.save_every) for run in runs]
        console.start(runs, [n for n, record in enumerate(records) if record.finished() is not None])
        if setup.head.kind == "text":  # a text head knows every class, so the untrained model can be evaluated
            learner = setup.learner(seeds[0])
            rows = [candidates(scenario, config, task.index) for task in scenario.tasks]
            tests = Images(scenario, cache).tests(len(scenario.tasks) - 1)
            matrix, counts = zero_shot(learner, tests, rows), [len(test) for test in tests]
            starting = metrics(matrix, counts) | {"accuracy_matrix": matrix, "test_counts": counts}
            del learner
        for number, run in enumerate(runs):
            record = records[number]
            console.next_run(number)
            result = record.finished()
            if result is None:
                kind = METHODS[run.method]
                learner = setup.learner(run.seed, kind.head, run.config, kind.frozen)
                method = kind.build(learner, trajectories[run.seed], run.protocol)
                state = learn(learner, method, run.scenario, Images(run.scenario, cache), record, console)
                result = metrics(state.matrix, state.test_counts) | {
                    "accuracy_matrix": state.matrix,
                    "test_counts": state.test_counts,
                    "also": {
                        name: metrics(matrix, state.test_counts) | {"accuracy_matrix": matrix}
                        for name, matrix in state.also.items()
                    },
                    "kept_bytes": state.kept_bytes,
                    "peak_memory_bytes": max(state.peak_memory_bytes),
                    "peak_memory_bytes_per_task": state.peak_memory_bytes,
                    "seconds": state.seconds,
                    "bad_images": state.bad_images,
                }
                recipe = {
                    "method": run.label,
                    "seed": run.seed,
                    "config": to_dict(run.config),
                    "class_names": setup.dataset.class_names,
                    "head": learner.head.kind,
                    "features": method.features().kind,
                    "final_accuracy": result["final_accuracy"],
                }
                names = [task.name for task in run.scenario.tasks]
                record.finish(result, names, model_tensors(learner.backbone, learner.head, method.features()), recipe)
                del learner, method
            else:
                console.line(f"{run.label} seed {run.seed}: already finished")
            results[run.label][str(run.seed)] = result
    except Interrupted:
        console.close()
        number = StopRequest.signal or signal.SIGINT
        print(
            f"stopped by {signal.Signals(number).name}; saved. The same command continues from there.", file=sys.stderr
        )
        return 128 + number
    finally:
        console.close()
        StopRequest.signal = None
        for s, handler in previous.items():
            signal.signal(s, handler)

    for trajectory in trajectories.values():
        if config.training.keep_trajectory:
            trajectory.keep()
        trajectory.delete()
    save_json(
        folder.path / "results.json",
        {"zero_shot": starting, "methods": results, "summary": summary(results)},
    )
    draw(folder.path / "plots", results, starting)
    table = results_rows(results, starting)
    save_text(folder.path / "results.md", results_markdown(table))
    console.rich.print(results_table(table))
    console.line(comparison(results, starting))
    console.line(f"results, plots and models: {folder.path}")
    return 0


def request_stop(console: Any) -> Any:
    """Return a signal handler: the first signal saves and stops after this step, the second stops at once."""
    from fastmerge.runfolder import StopRequest

    def handler(number: int, frame: Any) -> None:
        if StopRequest.signal is not None:
            raise KeyboardInterrupt
        StopRequest.signal = number
        console.line("stopping after this step (a second signal stops at once, without saving)")

    return handler


if __name__ == "__main__":
    sys.exit(main())
