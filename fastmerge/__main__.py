"""The command line: `train`, the default, reads the flags, runs every method and seed and prints a table.

    python -m fastmerge                                                     # built-in glyphs and tiny CLIP, no download
    python -m fastmerge --dataset imagenet1k --tasks 100 --data-root DIR    # the main job
    python -m fastmerge --method trm finetune --seeds 0 1 2                 # one comparison table
    python -m fastmerge evaluate runs/glyphs-cil5-tiny/trm-seed0            # other commands: commands/

Exit codes: 0 done; 1 a fault of fastmerge; 2 bad input (the message says what to do); 129, 130 or 143 stopped by SIGHUP,
SIGINT (Ctrl-C) or SIGTERM (the same command continues the run). A closed pipe (`| head`) does not end a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import pkgutil
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmerge.commands import COMMANDS
from fastmerge.errors import Busy, UserError, first_line, nearest

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    from fastmerge import presets
    from fastmerge.flags import parse
    from fastmerge.output import guarded

    config = None
    word, rest = split_word(sys.argv[1:] if argv is None else argv)
    with guarded() as out:
        try:
            if word in COMMANDS:
                code = pkgutil.resolve_name(COMMANDS[word][0])(rest)
            elif word == "train":
                config = parse(rest)
                swept = pkgutil.resolve_name("fastmerge.commands.sweep:sweep") if config.run.sweep else None
                code = swept(config, run) if swept else run(config)
            else:
                known = ("train", *COMMANDS)
                raise UserError(f"unknown command {word!r}.{nearest(word, known)} There are: {', '.join(known)}.")
        except SystemExit as stop:  # --help
            code = int(stop.code or 0)
        except UserError as error:
            message = presets.explained(str(error), config) if config else str(error)
            print(f"{of_rank()}error: {message}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        except Exception as error:
            code = unexpected(error, config)
        finally:
            leave()
            gc.unfreeze()  # `run` froze objects; without this, extension modules report leaks at exit
        if out is not None:
            out.flush()
            if code == 0 and out.lost:
                where = f"; the results are in {config.run.run_dir}" if config else ""
                print(f"error: standard output cannot be written ({out.lost.strerror}){where}", file=sys.stderr)
                code = 2
    return code


def of_rank() -> str:
    """'rank N: ' in the processes that torchrun started, but for the first."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def leave() -> None:
    """Leave the other processes of the command, if there are any."""
    if "fastmerge.ranks" in sys.modules:
        sys.modules["fastmerge.ranks"].leave()


def split_word(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The command and its flags; a command line that starts with a flag is a training."""
    if argv and not argv[0].startswith("-"):
        return argv[0], list(argv[1:])
    return "train", list(argv)


def unexpected(error: Exception, config: Any) -> int:
    """Print what happened, where the run is saved, and how to report it. Return the exit code."""
    short = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # of a GPU
    if short:
        print(f"error: out of memory: {first_line(error)}", file=sys.stderr)
        print("Try a smaller --cache-gb; or a smaller --batch-size or --model with another --run-dir.", file=sys.stderr)
    else:
        traceback.print_exception(error)
        print("error: this is a fault of fastmerge, not of your command.", file=sys.stderr)
    folder = Path(config.run.run_dir) if config else None
    begun = folder is not None and (folder / "environment.json").exists()
    if begun:
        print(
            f"The run is saved in {folder} up to its last checkpoint; the same command continues there.",
            file=sys.stderr,
        )
    if not short:
        with_it = f" and with {folder}/environment.json and config.json" if begun else ""
        print(f"Please report it with all of these lines, with the command{with_it}.", file=sys.stderr)
    return 2 if short else 1


def run(config: Any) -> int:
    """Prepare, run every method and seed, and report. Return the exit code."""
    # imported here so that --help and flag errors appear at once
    from fastmerge.checkpoint import save_json, save_text
    from fastmerge.console import Console
    from fastmerge.estimate import estimate
    from fastmerge.evaluate import accuracies_within, metrics, zero_shot
    from fastmerge.identity import determinants
    from fastmerge.loop import OWN, Images, candidates, learn, own_classes
    from fastmerge.machine import choose_device, environment
    from fastmerge.methods import METHODS
    from fastmerge.methods.trajectory import Trajectory
    from fastmerge.models.recompute import blocks_of
    from fastmerge.models.saved import model_tensors, recipe
    from fastmerge.page import page
    from fastmerge.plan import plan, read_method, shared_trainings
    from fastmerge.plots import draw
    from fastmerge.ranks import begin, end
    from fastmerge.report import (
        below,
        comparison,
        header,
        results_markdown,
        results_rows,
        single_class_warning,
        summary,
        warmup_warning,
    )
    from fastmerge.results import TRANSFER, finished
    from fastmerge.runfolder import Interrupted, RunFolder, StopRequest, known_runs
    from fastmerge.setup import Setup
    from fastmerge.sinks import Sinks, wanted
    from fastmerge.transfer import forward_transfer, images_beside, retention

    gc.collect()
    gc.freeze()  # imported objects stay alive; otherwise the collection before every task spends 0.3 s on them

    group = begin(choose_device(config.run.device))
    console = Console(config.run.quiet or group.rank > 0)
    for spec in config.training.method:
        read_method(spec, config)  # reports a wrong name before any data is read
    kinds = wanted(config) if group.rank == 0 else []
    with group.first():
        setup = Setup(config, console.encoding)
    config, scenario, cache, seeds = setup.config, setup.scenario, setup.cache, config.training.seeds
    runs = [
        dataclasses.replace(run, beside=images_beside(run.scenario, METHODS[run.method], setup.head, setup.retained))
        for run in plan(config, scenario, setup.earlier)
    ]
    for run in runs:  # before anything is trained or written
        its_model = dataclasses.replace(run.config.model, head=setup.head.kind)  # type: ignore[arg-type]
        METHODS[run.method].check(dataclasses.replace(run.config, model=its_model), setup.backbone)
        METHODS[run.method].check_classes(run.config, setup.dataset.class_names)
        METHODS[run.method].check_tasks(run.config, run.scenario)
        if METHODS[run.method].needs_text and setup.text is not None:
            METHODS[run.method].check_text(run.config, setup.text)
        if run.config.training.checkpoint_gradients and METHODS[run.method].trains:
            blocks_of(setup.backbone)
    manifest = scenario.manifest() | {
        "weights": setup.backbone.weights,
        "weights_sha256": setup.backbone.weights_sha256,
    }

    def warn(text: str) -> None:
        console.line(f"warning: {text}", style="yellow")

    determined = determinants(setup, runs, manifest)
    if setup.earlier is not None:
        setup.earlier.check(determined)
    if not config.run.dry_run:
        folder = RunFolder(config, environment(setup.device), manifest, determined, warn)
    for text in header(setup, manifest, Path(config.run.run_dir)):
        console.line(text)
    done = len(setup.earlier.scenario.tasks) if setup.earlier else 0
    for text in estimate(runs, setup.backbone, setup.device, cache.budget_bytes, done, setup.text):
        console.line(text)
    for text in manifest["warnings"]:
        console.line(f"note: {text}", style="yellow")
    if setup.random_weights:
        warn("--pretrained none: the backbone starts from random weights")
    trained = [(run.scenario.tasks[done:], run.config.training) for run in runs if METHODS[run.method].trains]
    warnings = [warmup_warning(tasks, training) for tasks, training in trained]
    for warning in dict.fromkeys([*warnings, single_class_warning([task for tasks, _ in trained for task in tasks])]):
        if warning is not None:
            warn(warning)

    if config.run.dry_run:
        known_runs(Path(config.run.run_dir), determined)
        console.line("--dry-run: nothing is trained, and no run folder is written")
        return 0

    labels = list(dict.fromkeys(run.label for run in runs))
    share = shared_trainings(runs, config.training.keep_trajectory)
    trajectories = [
        Trajectory(folder.path / f"trajectory-seed{run.seed}", share, run.label, run.scenario, run.variant)
        for run in runs
    ]
    starting: dict[str, Any] | None = None
    busy: list[str] = []  # runs that another process works on

    def write() -> Any:
        """Write the results of all finished runs of the folder, those of other commands too. Return them, their table, and
        the lines below it."""
        results = finished(folder.path, labels)
        about = {"zero_shot": starting, "methods": results, "summary": summary(results)}
        save_json(folder.path / "results.json", about)
        table = results_rows(results, starting)
        save_text(folder.path / "results.md", results_markdown(table))
        return results, table, [comparison(results, starting), *below(results, starting)]

    previous = {
        s: signal.signal(s, request_stop(console))
        for s in SIGNALS
        if (s, signal.getsignal(s)) != (getattr(signal, "SIGHUP", None), signal.SIG_IGN)  # nohup
    }
    stopped, StopRequest.signal = False, None
    try:
        records = [folder.record(run.folder, config.run.save_every) for run in runs]
        results = [record.finished() for record in records]
        for record, result in zip(records, results, strict=True):
            if result is not None and not (record.folder / "model.safetensors").exists():
                warn(
                    f"{record.folder} has results, but no model.safetensors. The results are kept; delete the folder to "
                    "train it again, to the same bits"
                )
        finished(folder.path)  # a damaged result of another run is told now, not after hours
        console.start(runs, [n for n, result in enumerate(results) if result is not None])
        if setup.head.kind == "text":  # a text head knows every class, so the untrained model can be evaluated
            learner = setup.learner(seeds[0], frozen=True)  # without the prefix or LoRA that a method would add
            learner.parts.say = console.line
            rows = [candidates(scenario, config, task.index) for task in scenario.tasks]
            tests = Images(scenario, cache).tests(len(scenario.tasks) - 1)
            matrix, counts = zero_shot(learner, tests, rows), [len(test) for test in tests]
            starting = metrics(matrix, counts) | {"accuracy_matrix": matrix, "test_counts": counts}
            starting |= dict.fromkeys(TRANSFER)  # of the starting model against itself
            if own := own_classes(scenario, len(tests)):
                _, within = accuracies_within(learner, tests, rows[-1], own)
                matrix = [within] * len(within)
                starting["also"] = {OWN: metrics(matrix, counts) | {"accuracy_matrix": matrix}}
            if setup.retained is not None:
                starting["retained"] = setup.retained.accuracy(learner, None, cache)
            starting["templates"] = list(scenario.dataset.templates)
            del learner
        for number, run in enumerate(runs):
            record = records[number]
            console.next_run(number)
            claim = folder.claim(record.folder.name)  # not `results`: what processes see there may differ
            if claim == "busy":
                busy.append(record.folder.name)
                console.skip(number)
                console.line(f"{run.label} seed {run.seed}: another process works on it")
            elif claim == "claimed":
                kind = METHODS[run.method]
                learner = setup.learner(run.seed, kind.head, run.config, kind.frozen)
                method = kind.build(learner, trajectories[number], run.protocol)
                with contextlib.closing(Sinks(kinds, record.folder.name, record.folder, run.config)) as sinks:
                    record.listen = sinks.write
                    start = functools.partial(setup.earlier.start, run, learner, method) if setup.earlier else None
                    state = learn(
                        learner,
                        method,
                        run.scenario,
                        Images(run.scenario, cache),
                        record,
                        console,
                        start,
                        setup.retained,
                    )
                result = metrics(state.matrix, state.test_counts) | {
                    "label": run.label,
                    "accuracy_matrix": state.matrix,
                    "test_counts": state.test_counts,
                    "also": {
                        name: metrics(matrix, state.test_counts) | {"accuracy_matrix": matrix}
                        for name, matrix in state.also.items()
                    },
                    "before_training": state.before,
                    "forward_transfer": forward_transfer(state.before, (starting or {}).get("accuracy_matrix")),
                    "retained": state.retained,
                    "retention": retention(state.retained, (starting or {}).get("retained")),
                    "kept_bytes": state.kept_bytes,
                    "peak_memory_bytes": max(state.peak_memory_bytes),
                    "peak_memory_bytes_per_task": state.peak_memory_bytes,
                    "seconds": state.seconds,
                    "bad_images": state.bad_images,
                    "bytes_written": state.bytes_written,
                    "keeps_images": kind.keeps_images,
                    "chosen_on_test": method.chosen_on_test,
                }
                names, features = [task.name for task in run.scenario.tasks], method.features()
                about = {"method": run.label, "seed": run.seed, "final_accuracy": result["final_accuracy"]}
                kept = method.state_dict()
                about = recipe(learner, features, run.scenario, len(names) - 1, **about) | {"kept": sorted(kept)}
                record.finish(result, names, model_tensors(learner.backbone, learner.head, features), about, kept)
                folder.release(record.folder.name)
                with folder.changing():
                    write()
                del learner, method
            else:
                console.skip(number)
                console.line(f"{run.label} seed {run.seed}: already finished")
    except Interrupted:
        console.close()
        stopped, number = True, StopRequest.signal or signal.SIGINT
        print(
            f"stopped by {signal.Signals(number).name}; saved. The same command continues from there.", file=sys.stderr
        )
        return 128 + number
    finally:
        console.close()
        folder.leave()  # a later run of this process may go on with them
        if not stopped:  # else one more Ctrl-C still ends the process at once, while Python cleans up
            StopRequest.signal = None
            for s, handler in previous.items():
                signal.signal(s, handler)

    group.wait()
    end()  # the rest is the work of rank 0
    if group.rank:
        return 0
    with folder.changing():
        alone = not busy and folder.alone()
        for trajectory in trajectories:
            if config.training.keep_trajectory:
                trajectory.keep()
            if alone:
                trajectory.delete()
        if busy and not finished(folder.path):
            raise Busy(f"--run-dir {folder.path}: other processes work on all of these runs: {', '.join(busy)}; wait")
        every, table, lines = write()
        draw(folder.path / "plots", every, starting)
        save_text(folder.path / "report.html", page(folder.path, every, starting, table, lines))
    console.table(table)
    console.line(lines[0])
    for text in lines[1:]:
        warn(text)
    if busy:
        console.line(f"not in this table yet: {', '.join(busy)}; the process that finishes them makes the whole one")
    console.line(f"results, plots and models: {folder.path}; all on one page: {folder.path / 'report.html'}")
    return 0


def request_stop(console: Any) -> Any:
    """Return a signal handler: the first signal saves and stops after this step, the second stops at once."""
    from fastmerge.runfolder import StopRequest

    def handler(number: int, frame: Any) -> None:
        if StopRequest.signal is not None:
            with contextlib.suppress(Exception):  # this may interrupt a write
                console.close()
                print("stopped at once; the same command continues from the last checkpoint", file=sys.stderr)
                sys.stderr.flush()
            os._exit(128 + number)  # an exception here could surface anywhere, with a traceback
        StopRequest.signal = number
        console.line("stopping after this step (a second signal stops at once, without saving)")

    return handler


if __name__ == "__main__":
    sys.exit(main())
