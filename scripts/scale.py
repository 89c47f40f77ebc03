"""The projection of the main job in docs/SCALE.md: 100 tasks of ImageNet, ViT-B/16, TRM alone, on 1, 8 and 64 GPUs.

    python scripts/scale.py            # print the tables
    python scripts/scale.py --write    # put them into docs/SCALE.md

FLOPs and calls of torch's dispatcher are counted on fake tensors: nothing is computed, and no GPU is used. What a GPU
reaches is an assumption, in ASSUMED. `bench/gpu.py` measures.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastmerge.models.attention import differentiable_attention

PAGE = Path(__file__).resolve().parent.parent / "docs" / "SCALE.md"
MODEL, BATCH, TASKS = "ViT-B-16-quickgelu", 128, 100
TRAIN, TEST, EPOCHS, MERGE_EPOCHS = 1_281_167, 50_000, 15, 5
ASSUMED = {
    "products": 0.4 * 989e12,  # FLOP/s: 40 % of an H100's dense bf16 peak
    "memory": 0.9 * 3.35e12,  # bytes/s: 90 % of an H100's HBM3
    "call": 5e-6,  # seconds of host time per dispatcher call
    8: 400e9,  # bytes/s per GPU in an all-reduce over NVLink
    64: 40e9,  # the same over 400 Gb/s InfiniBand, one port per GPU
}
BYTES = {"train": 60, "search": 64}  # per weight and step: gradient, AdamW, clipping; merge, g and its products, slopes


class Calls(TorchDispatchMode):
    """Counts dispatcher calls."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def counted() -> tuple[int, dict[str, dict[str, float]]]:
    """The number of weights of the image tower; and per kind of step the FLOPs of an image and the calls of a step."""
    found: dict[str, dict[str, float]] = {}
    with FakeTensorMode():
        tower = open_clip.CLIP(**open_clip.get_model_config(MODEL)).visual
        weights, images = list(tower.parameters()), torch.zeros(2, 3, 224, 224)

        def loss() -> torch.Tensor:
            return tower(images).square().sum()

        def forward() -> None:
            with torch.no_grad():
                tower(images)

        def search() -> None:
            first = loss()
            g = torch.autograd.grad(first, weights, create_graph=True)
            torch.autograd.backward([first, *g], [torch.ones(()), *(x.detach() for x in g)])

        def in_parts() -> None:  # several GPUs: g of the whole batch first
            loss().backward()
            search()

        steps: dict[str, Callable[[], Any]] = {
            "forward": forward,
            "train": lambda: loss().backward(),
            "search": search,
            "search in parts": in_parts,
        }
        for name, step in steps.items():
            calls, flops = Calls(), FlopCounterMode(display=False)
            with differentiable_attention(), flops:  # the products of fused attention are not counted on the CPU
                step()
            with differentiable_attention() if "search" in name else contextlib.nullcontext(), calls:
                step()
            found[name] = {"flops": flops.get_total_flops() / len(images), "calls": calls.count}
        return sum(p.numel() for p in weights), found


def work() -> dict[str, int]:
    """Images of every kind of step. Evaluation after task t is of the test images of t tasks; nearest-mean is beside it."""
    tests = sum(TEST * t // TASKS for t in range(1, TASKS + 1))
    later = TRAIN - TRAIN // TASKS  # the first task is not merged
    forward = 2 * later + (tests + TEST) + (TRAIN + tests)  # teacher; evaluation and zero-shot; nearest-mean
    return {"train": EPOCHS * TRAIN, "search": MERGE_EPOCHS * later, "forward": forward}


def hours(gpus: int, weights: int, steps: dict[str, dict[str, float]], host: bool = True) -> dict[str, float]:
    """Hours per kind of step. A step takes the larger of the GPU's time and the host's, and then its all-reduces. host:
    whether the host's time counts; it does not where it is hidden, by a compiled step or a CUDA graph."""
    result = {}
    for kind, images in work().items():
        step = steps["search in parts" if kind == "search" and gpus > 1 else kind]
        own = -(-BATCH // gpus)
        gpu = own * step["flops"] / ASSUMED["products"] + BYTES.get(kind, 0) * weights / ASSUMED["memory"]
        calls = step["calls"] * ASSUMED["call"] if host else 0
        reduces = kind != "forward" and gpus > 1  # the gradient in training, g in the search
        network = reduces * 2 * (gpus - 1) / gpus * 4 * weights / ASSUMED.get(gpus, 1.0)
        result[kind] = images / BATCH * (max(gpu, calls) + network) / 3600
    return result


def tables() -> str:
    weights, steps = counted()
    unit = steps["forward"]["flops"]
    lines = ["| step | GFLOP per image | in forward passes | dispatcher calls per step |", "|---|--:|--:|--:|"]
    for name, step in steps.items():
        flops = step["flops"]
        lines.append(f"| {name} | {flops / 1e9:.1f} | {flops / unit:.1f} | {step['calls']:,.0f} |")
    total = {kind: n * steps[kind]["flops"] for kind, n in work().items()}
    lines += ["", "| | training | search | forward alone | sum |", "|---|--:|--:|--:|--:|"]
    counts = [f"{n / 1e6:.1f} M" for n in work().values()]
    lines.append(f"| images | {' | '.join(counts)} | |")
    lines.append(
        f"| FLOP | {' | '.join(f'{n:.2g}' for n in total.values())} | {sum(total.values()):.2g} |".replace("e+", "e")
    )
    for gpus in (1, 8, 64):
        for host in (True, False):
            found = hours(gpus, weights, steps, host)
            cells = " | ".join(f"{h:.2f} h" for h in found.values())
            name = f"{gpus} GPU{'s' * (gpus > 1)}" + ("" if host else ", host hidden")
            lines.append(f"| {name} | {cells} | **{sum(found.values()):.2f} h** |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with its tables replaced."""
    return re.sub(r"(<!-- scale\.py -->\n).*?(<!-- end -->)", lambda m: m[1] + tables() + m[2], text, flags=re.S)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(PAGE.read_text()))
    else:
        print(tables())
