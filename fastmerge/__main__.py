"""Flags in, runs, table out.

    python -m fastmerge                                                     # embedded glyphs and tiny CLIP, no download
    python -m fastmerge --dataset imagenet1k --tasks 100 --data-root DIR    # the main job
    python -m fastmerge --method trm finetune --seeds 0 1 2                 # one comparison table

Exit codes: 0 done, 2 bad input (with what to do), 130 or 143 stopped by a signal (the same command continues).
"""

from __future__ import annotations

import gc
import signal
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from fastmerge.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from fastmerge.config import parse

    try:
        return run(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        gc.unfreeze()  # what `run` froze, or extension modules complain about leaks at the end


def run(config: Any) -> int:
    """Everything after the flags: prepare, run every method and seed, report. Returns the exit code."""
    # here, so that --help and wrong flags answer at once
    from fastmerge.checkpoint import save_json, write_atomically
    from fastmerge.config import to_dict
    from fastmerge.console import Console, results_markdown, results_rows, results_table
    from fastmerge.evaluate import metrics, zero_shot
    from fastmerge.loop import Images, candidates, learn
    from fastmerge.machine import environment
    from fastmerge.methods import METHODS, build_method, plan, read_method, shared_trainings
    from fastmerge.methods.trajectory import Trajectory
    from fastmerge.models.saved import model_tensors
    from fastmerge.plots import draw
    from fastmerge.runfolder import Interrupted, RunFolder, StopRequest
    from fastmerge.setup import Setup

    gc.collect()
    gc.freeze()  # what the imports made stays; without this the collection before every task takes 0.3 s to see that

    console = Console(config.run.quiet)
    for spec in config.training.method:
        read_method(spec, config)  # a wrong name is told before any data is read
    setup = Setup(config, console.encoding)
    scenario, cache, seeds = setup.scenario, setup.cache, config.training.seeds
    runs = plan(config, scenario)
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
    if text := warmup_warning(scenario, config.training):
        console.line(f"warning: {text}", style="yellow")

    results: dict[str, dict[str, Any]] = {run.label: {} for run in runs}
    share = shared_trainings(runs, config.training.keep_trajectory)
    trajectories = {seed: Trajectory(folder.path / f"trajectory-seed{seed}", share) for seed in seeds}
    starting: dict[str, Any] | None = None
    previous = {s: signal.signal(s, request_stop(console)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        records = [folder.record(run.label, run.seed, config.run.save_every) for run in runs]
        console.start(runs, [n for n, record in enumerate(records) if record.finished() is not None])
        if setup.head.kind == "text":  # it knows every class from the start, so the untrained model can be scored
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
                learner = setup.learner(run.seed, getattr(METHODS.get(run.method), "head", None), run.config)
                method = build_method(run, learner, trajectories[run.seed])
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
                    "final_accuracy": result["final_accuracy"],
                }
                names = [task.name for task in run.scenario.tasks]
                record.finish(result, names, model_tensors(backbone=learner.backbone, head=learner.head), recipe)
                del learner, method
            else:
                console.line(f"{run.label} seed {run.seed}: finished before, kept")
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
    rows = results_rows(results, starting)
    write_atomically(folder.path / "results.md", lambda path: path.write_text(results_markdown(rows), encoding="utf-8"))
    console.rich.print(results_table(rows))
    console.line(comparison(results, starting))
    console.line(f"results, plots and models: {folder.path}")
    return 0


def request_stop(console: Any) -> Any:
    """A handler that asks the run to save and stop after this step; the second signal stops at once."""
    from fastmerge.runfolder import StopRequest

    def handler(number: int, frame: Any) -> None:
        if StopRequest.signal is not None:
            raise KeyboardInterrupt
        StopRequest.signal = number
        console.line("stopping after this step (again: at once, back to the last checkpoint)")

    return handler


def header(setup: Any, manifest: dict[str, Any], folder: Any) -> list[str]:
    """What is about to run, in a few lines."""
    scenario, backbone = setup.scenario, setup.backbone
    dataset = scenario.dataset
    sizes = [len(task.classes) for task in scenario.tasks]
    shown = ", ".join(f"{sizes.count(s)} x {s}" for s in sorted(set(sizes), reverse=True))
    kind = "class-incremental" if scenario.kind == "cil" else "domain-incremental"
    return [
        f"{dataset.name}: {len(dataset.class_names)} classes, {len(dataset.train)} train and {len(dataset.test)} test images",
        f"{kind}, {len(sizes)} tasks with {shown} classes, order {manifest['order_sha256']}",
        f"{backbone.name}: {sum(p.numel() for p in backbone.parameters()) / 1e6:.1f} M parameters, {backbone.weights}, "
        f"{setup.head.kind} head, {backbone.image_size} px, {setup.device}",
        f"results go to {folder.path}",
    ]


def warmup_warning(scenario: Any, training: Any) -> str | None:
    """Where the warm-up never ends: the highest learning rate that the shortest task reaches."""
    steps = training.epochs * -(-min(len(task.train) for task in scenario.tasks) // training.batch_size)
    if steps >= training.warmup_steps:
        return None
    highest = training.lr * steps / training.warmup_steps
    return (
        f"--warmup-steps {training.warmup_steps}: the shortest task has {steps} steps, so its learning rate "
        f"only rises, to {highest:.2g} instead of {training.lr:.2g}"
    )


def summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample deviation over the seeds of every metric, per method; the deviation is None with one seed."""
    table: dict[str, Any] = {}
    for method, seeds in results.items():
        table[method] = {}
        for name in ("final_accuracy", "final_accuracy_macro", "aaa", "aaa_macro", "forgetting", "bwt", "plasticity"):
            values = [r[name] for r in seeds.values() if r[name] is not None]
            spread = statistics.stdev(values) if len(values) > 1 else None
            table[method][name] = {"mean": statistics.mean(values) if values else None, "std": spread, "n": len(values)}
    return table


def comparison(results: dict[str, dict[str, Any]], starting: dict[str, Any] | None) -> str:
    """One sentence: how far each method ends above the starting model and above plain fine-tuning."""
    final = {m: statistics.mean(r["final_accuracy"] for r in seeds.values()) for m, seeds in results.items()}
    several = len(final) > 4
    base = {"zero-shot": starting["final_accuracy"]} if starting else {}
    if "finetune" in final:
        base["plain fine-tuning"] = final["finetune"]
    lines = []
    best = max(
        (m for m in final if m not in ("joint", "finetune")), key=final.get, default=None
    )  # of many, only this one
    for method, accuracy in final.items():
        if several and method != best:
            continue
        against = [
            f"{accuracy - b:+.1f} against {name}"
            for name, b in base.items()
            if (method, name) != ("finetune", "plain fine-tuning")
        ]
        lines.append(
            f"{'best: ' * several}{method} ends at {accuracy:.1f} %" + (f" ({', '.join(against)})" if against else "")
        )
    return "; ".join(lines)


if __name__ == "__main__":
    sys.exit(main())
