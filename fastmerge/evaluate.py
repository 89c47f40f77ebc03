"""The accuracy matrix and all metrics derived from it.

R[i][j] = accuracy in percent on the test images of task j after task i. The task id is not given: the candidates are
all classes seen up to task i (`--eval-classes all`: all classes of the data set), so the label space of a
class-incremental matrix grows with i. R[i][j] is None if task j was not evaluated. n[j] = number of test images of task j.
There are T tasks; the code counts them from 0.

If tasks are data sets, a second matrix "own classes" has the classes of task j alone as candidates: there the task id is
given, as in the papers on merging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastmerge.data.cache import TaskImages
from fastmerge.errors import UserError
from fastmerge.training import Learner, positions
from fastmerge.wording import counted

Matrix = Sequence[Sequence[float | None]]


def batches(tests: Sequence[TaskImages], size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (uint8 images `[b, 3, s, s]`, labels `[b]`, index of the test set `[b]`). A batch may span several test
    sets, so a hundred small tasks need as many forward passes as one large one."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    room = size
    for j, images in enumerate(tests):
        first = torch.arange(len(images))[:room]  # fills up the batch of the previous test sets
        order = [rows for rows in (first, *torch.arange(len(first), len(images)).split(size)) if len(rows)]
        images.plan(order)
        for rows in order:
            pixels, labels = images.batch(rows)
            parts.append((pixels, labels, torch.full_like(labels, j)))
            room -= len(rows)
            if room == 0:
                yield _together(parts)
                parts, room = [], size
    if parts:
        yield _together(parts)


def _together(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    pixels, labels, tests = zip(*parts, strict=True)
    return torch.cat(pixels), torch.cat(labels), torch.cat(tests)


def accuracies(
    learner: Learner,
    tests: Sequence[TaskImages],
    classes: Sequence[int],
    tick: Callable[[int], None] = lambda n: None,
    features: Callable[[Tensor], Tensor] | None = None,
) -> list[float | None]:
    """One row of the matrix: accuracy in percent on each of `tests`, with `classes` (natural indices) as candidates.

    `tick(n)` is called after every batch of n images. features: maps normalised images to features (default: the
    backbone). A test set without images gives None.
    """
    return accuracies_within(learner, tests, classes, None, tick, features)[0]


@torch.no_grad()
def accuracies_within(
    learner: Learner,
    tests: Sequence[TaskImages],
    classes: Sequence[int],
    own: Sequence[Sequence[int]] | None,
    tick: Callable[[int], None] = lambda n: None,
    features: Callable[[Tensor], Tensor] | None = None,
) -> tuple[list[float | None], list[float | None]]:
    """Two rows from one pass: `accuracies`, and the accuracies where the candidates of test j are `own[j]`, a part of
    `classes` (the second row is empty without `own`)."""
    features = features or learner.backbone
    head = getattr(features, "head", None) or learner.head
    candidates = torch.tensor(classes, device=learner.device)
    allowed = (
        torch.stack([torch.isin(candidates, torch.tensor(o, device=learner.device)) for o in own]) if own else None
    )
    correct = torch.zeros(2, len(tests), dtype=torch.int64, device=learner.device)
    broken = torch.zeros((), dtype=torch.int64, device=learner.device)
    for pixels, labels, test in batches(tests, learner.config.training.batch_size):
        logits = head(learner.without_gradient(features, pixels), candidates)
        truth = positions(labels, candidates)
        correct[0].index_add_(0, test, (logits.argmax(1) == truth).long())
        if allowed is not None:
            inside = logits.masked_fill(~allowed[test], -torch.inf)
            correct[1].index_add_(0, test, (inside.argmax(1) == truth).long())
        broken += unusable(logits)
        tick(len(labels))
    refuse(broken)
    row, within = (
        [100.0 * c / len(images) if len(images) else None for c, images in zip(counts, tests, strict=True)]
        for counts in correct.tolist()
    )
    return row, within if own else []


def unusable(logits: Tensor) -> Tensor:
    """How many images have a logit that is nan or +inf; -inf is a class that cannot be predicted. 0-d, on the device."""
    return (~(logits < torch.inf)).any(1).sum()


def refuse(broken: Tensor) -> None:
    """Raise UserError if the logits of some images were unusable. Asked once, at the end: it waits for the device."""
    if count := int(broken):
        raise UserError(
            f"the logits of {counted(count, 'test image')} are not finite: the model predicts nothing. Try a smaller "
            "learning rate or merge factor with another --run-dir; if no task was trained yet, other weights"
        )


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are known; None if none is."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def macro(row: Sequence[float | None]) -> float | None:
    """A_t, mean over tasks: (1/t) sum_j R[t][j] (CODA-Prompt, L2P, mammoth, magmax)."""
    return mean(row)


def micro(row: Sequence[float | None], counts: Sequence[int]) -> float | None:
    """A_t, mean over images: correct / total (PILOT, C3Box, RanPAC). Equals FACIL's size-weighted mean."""
    total = sum(n for r, n in zip(row, counts, strict=False) if r is not None)
    return sum(r * n for r, n in zip(row, counts, strict=False) if r is not None) / total if total else None


def metrics(matrix: Matrix, counts: Sequence[int]) -> dict[str, float | None]:
    """Every metric of a finished (or partial) run from its lower-triangular part. All values are in percent (points).

    final_accuracy, final_accuracy_macro: A_T, `micro` and `macro` over the tasks seen.
    aaa, aaa_macro: average anytime accuracy, (1/T) sum_t A_t (PILOT's "average accuracy", "average incremental accuracy").
    forgetting: mean over j < T of max_l R[l][j] - R[T][j], over all l including T, so >= 0 (PILOT, mammoth).
    forgetting_before_last: the same with l < T only; may be negative (Chaudhry et al. 2018; continuum, FACIL).
    bwt: backward transfer, mean over j < T of R[T][j] - R[j][j] (Lopez-Paz & Ranzato 2017).
    plasticity: mean over j of R[j][j] (learning accuracy, Riemer et al. 2019).

    Forward transfer and zero-shot retention are in transfer.py: they need other evaluations.

    With one task the forgetting metrics and bwt are undefined and are None.
    """
    rows = [list(row[: i + 1]) for i, row in enumerate(matrix)]
    if not rows:
        names = "final_accuracy final_accuracy_macro aaa aaa_macro forgetting forgetting_before_last bwt plasticity"
        return dict.fromkeys(names.split())
    last, old = rows[-1], range(len(rows) - 1)

    def drops(include_last: bool) -> list[float | None]:
        stop = len(rows) if include_last else len(rows) - 1
        best = [max((r for r in (rows[i][j] for i in range(j, stop)) if r is not None), default=None) for j in old]
        ends = [last[j] for j in old]
        return [b - e if b is not None and e is not None else None for b, e in zip(best, ends, strict=True)]

    pairs = [(last[j], rows[j][j]) for j in old]
    return {
        "final_accuracy": micro(last, counts),
        "final_accuracy_macro": macro(last),
        "aaa": mean([micro(row, counts) for row in rows]),
        "aaa_macro": mean([macro(row) for row in rows]),
        "forgetting": mean(drops(include_last=True)),
        "forgetting_before_last": mean(drops(include_last=False)),
        "bwt": mean([a - b for a, b in pairs if a is not None and b is not None]),
        "plasticity": mean([row[-1] for row in rows]),
    }


@torch.no_grad()
def zero_shot(
    learner: Learner, tests: Sequence[TaskImages], candidates: Sequence[Sequence[int]]
) -> list[list[float | None]]:
    """The accuracy matrix of the starting model without training; row t uses `candidates[t]` as candidate classes.

    The head must know every class from the start (text). Row t is None for tests with classes that are not candidates.
    One pass over the images serves all rows.
    """
    everything = torch.tensor(sorted({c for row in candidates for c in row}), device=learner.device)
    masks = [torch.isin(everything, torch.tensor(row, device=learner.device)) for row in candidates]
    hits = torch.zeros(len(candidates), len(tests), dtype=torch.int64, device=learner.device)
    broken = torch.zeros((), dtype=torch.int64, device=learner.device)
    inside = torch.zeros_like(hits)  # test images whose class is a candidate
    for pixels, labels, test in batches(tests, learner.config.training.batch_size):
        logits = learner.head(learner.without_gradient(learner.backbone, pixels), everything)
        broken += unusable(logits)
        truth = positions(labels, everything)
        for t, mask in enumerate(masks):
            hits[t].index_add_(0, test, (logits.masked_fill(~mask, -torch.inf).argmax(1) == truth).long())
            inside[t].index_add_(0, test, mask[truth].long())
    refuse(broken)
    return [
        [100.0 * h / len(x) if n == len(x) > 0 else None for h, n, x in zip(hs, ns, tests, strict=True)]
        for hs, ns in zip(hits.tolist(), inside.tolist(), strict=True)
    ]
