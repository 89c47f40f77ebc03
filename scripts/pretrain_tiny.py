"""Pre-train the embedded backbone: CLIP on the characters that are not classes of the default `glyphs` run.

    python scripts/pretrain_tiny.py --steps 2400 --text-steps 600       # both towers
    python scripts/pretrain_tiny.py --names-only --text-steps 1200      # then the text tower to the finished image tower

Recorded for the weights in the package: seed 0, 33 + 8 minutes on two CPU cores shared with other work, 307,200 images.
Zero-shot, averaged over the templates: 74.2 % of 2,000 images of pre-training characters under a jitter seed not trained on
(813 names to choose from), 53.9 % on the 50 classes of the default run, whose characters and names were held out. After
the first command: 66.5 % and, over all 100 held-out characters, 27.0 %. The nearest class mean of the embeddings of the
default run's training images gives 98.2 %: what zero-shot lacks are the names. Floating-point sums differ between
machines, so another run gives other weights of the same quality.

Encoding all names takes the text tower longer than a batch of images takes the image tower, and learning both at once is
slow, so a table stands between them. The embedding of a name in the table is the normalised sum of a learnt vector for
every word, every pair of neighbouring words, and the name itself.
Image tower and table: cross-entropy of the images over all names of the table, scaled by the learnt temperature (CLIP's
loss from images to texts with every name as a candidate). Images are made anew at every step, in all twelve faces. The
jitter grows from `MILD` of its final strength, stronger than the data set's, in the first `GROWTH` of the steps: with
full jitter from the start the image tower stays on the plateau of the uniform prediction.
Text tower: squared distance to the table, at names in a random template of the data set's, half of them the beginning of
one name continued by the end of another, whose target is the sum for its words and pairs. This is what makes names
never seen land near names that share their words. The table is not kept: --names-only makes it anew from the mean
embeddings of the characters' images, by ridge regression on the words, pairs and names.
AdamW, linear warm-up, cosine, gradient norm at most 1. Nothing of the default run's classes, neither image nor name, is
used. Data parallel over processes of one thread each, since two threads in one small operation wait for each other.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fastmerge.data import glyphs
from fastmerge.models import tiny

CPU = torch.device("cpu")
BATCH = 128  # images of a step, over all workers
NAMES = 64  # of a text step, over all workers, half of them made up
ROUND = 2  # image steps per text step
WARMUP = 100
MILD, GROWTH = 0.3, 0.5
VALIDATION_SEED = 3  # of the jitter; the data set's splits have 1 and 2


def jitter(strength: float) -> glyphs.Jitter:
    r = strength
    affine = {"rotation": 14 * r, "scale": 0.23 * r, "shear": 0.18 * r, "shift": 3 * r}
    return glyphs.Jitter(**affine, contrast=1 - 0.7 * r, tint=0.12 * r, noise=0.22 * r)


def encode_names(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """model.encode_text, normalised, in chunks of similar length, each without the positions after its last END.

    The text tower is causal, so those positions change nothing.
    """
    length = tokens.argmax(1) + 1
    order = length.argsort()
    parts = []
    for chunk in order.split(64):
        n = int(length[chunk].max())
        x = model.token_embedding(tokens[chunk, :n]) + model.positional_embedding[:n]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:n, :n]))
        parts.append(x[torch.arange(len(x)), length[chunk] - 1] @ model.text_projection)
    return F.normalize(torch.cat(parts)[order.argsort()], dim=-1)


class NameTable(torch.nn.Module):
    """Embeddings of names: the normalised sum of what is learnt for their words, pairs of words, and themselves."""

    def __init__(self, names: list[str], dim: int):
        super().__init__()
        self.index: dict[str, int] = {}
        for name in names:
            for part in [*self.parts(name), f"={name}"]:
                self.index.setdefault(part, len(self.index))
        uses = Counter(part for name in names for part in self.parts(name))
        # Rare words tell names apart, so they start longer; pairs and whole names start at zero.
        scale = [0.0 if part[0] in "+=" else uses[part] ** -0.5 for part in self.index]
        self.bag = torch.nn.EmbeddingBag(len(self.index), dim, mode="sum")
        self.bag.weight.data = F.normalize(torch.randn(len(self.index), dim), dim=1) * torch.tensor(scale)[:, None]

    @staticmethod
    def parts(name: str) -> list[str]:
        words = name.split()
        return words + [f"+{a} {b}" for a, b in zip(words, words[1:], strict=False)]

    def lookup(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """What `forward` takes; parts that are not in the table are left out."""
        found = [[self.index[p] for p in [*self.parts(n), f"={n}"] if p in self.index] for n in names]
        offsets = torch.tensor([0, *(len(f) for f in found[:-1])]).cumsum(0)
        return torch.tensor([i for f in found for i in f]), offsets

    def fit(self, names: list[str], targets: Tensor, ridge: float = 0.05) -> None:
        """Least-norm sums for targets [n, dim]; what words and pairs cannot explain goes to the names themselves."""
        counts = torch.zeros(len(names), len(self.index))
        for row, name in zip(counts, names, strict=True):
            for part in [*self.parts(name), f"={name}"]:
                row[self.index[part]] += 1
        gram = counts @ counts.T + ridge * torch.eye(len(names))
        self.bag.weight.data = counts.T @ torch.linalg.solve(gram, targets)

    def forward(self, index: Tensor, offsets: Tensor) -> Tensor:
        return F.normalize(self.bag(index, offsets), dim=-1)  # [n, dim]


def made_up(names: list[str], rng: np.random.RandomState) -> str:
    """The beginning of one name, continued by the end of another."""
    head, tail = (names[i].split() for i in rng.randint(len(names), size=2))
    return " ".join(head[: rng.randint(1, len(head) + 1)] + tail[rng.randint(len(tail)) :])


def normalise(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (tiny.IMAGE_MEAN, tiny.IMAGE_STD))
    return (images.float() / 255 - mean) / std


@torch.no_grad()
def accuracy(model: open_clip.CLIP, images: Tensor, labels: Tensor, names: list[str]) -> float:
    """Per cent, in fp32; name embeddings averaged over the templates."""
    model.eval()
    texts = [encode_names(model, tiny.tokenize([t.format(n) for n in names])) for t in glyphs.TEMPLATES]
    text = F.normalize(torch.stack(texts).mean(0), dim=-1)
    features = torch.cat([model.encode_image(normalise(batch), normalize=True) for batch in images.split(256)])
    model.train()
    return 100 * (features @ text.T).argmax(1).eq(labels).float().mean().item()


def save(model: open_clip.CLIP, path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, partial)
    partial.replace(path)


class Group:
    """Parameters that are stepped together: AdamW, its schedule, and the sum of the workers' gradients."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, steps: int, decay: float = 0.1):
        self.parameters = parameters
        decayed = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay}
        free = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([decayed, free], lr=lr, betas=(0.9, 0.98), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda s: min((s + 1) / WARMUP, (1 + math.cos(math.pi * s / steps)) / 2)
        )

    def step(self) -> None:
        flat = torch.cat([p.grad.reshape(-1) for p in self.parameters])
        dist.all_reduce(flat)
        for p, g in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            p.grad.copy_(g.view_as(p))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()


def work(rank: int, args: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.workers)
    torch.manual_seed(args.seed)
    rng = np.random.RandomState(args.seed)  # every worker draws the whole batch and takes its part
    model = tiny.create_tiny().train()
    rows = np.array(glyphs.pretraining_rows())
    names = [glyphs.characters()[row][1] for row in rows]
    faces = len(glyphs.FACES)
    table = NameTable(names, tiny.CONFIG["embed_dim"])
    every_name = table.lookup(names)
    image_steps = 0 if args.names_only else args.steps
    of_images = [*model.visual.parameters(), model.logit_scale]
    known = {id(p) for p in of_images}
    of_names = [p for p in model.parameters() if id(p) not in known]
    image_group = Group(of_images, args.lr, args.steps)
    table_group = Group(list(table.parameters()), 2 * args.lr, args.steps, decay=0.0)
    text_group = Group(of_names, 2 * args.lr, image_steps // ROUND + args.text_steps)
    mine = slice(rank, None, args.workers)

    def text_step() -> float:
        chosen = [names[i] for i in rng.randint(len(names), size=NAMES // 2)]
        chosen += [made_up(names, rng) for _ in range(NAMES // 2)]
        templates = rng.randint(len(glyphs.TEMPLATES), size=NAMES)
        texts = [glyphs.TEMPLATES[t].format(name) for t, name in zip(templates, chosen, strict=True)]
        with torch.no_grad():
            target = table(*table.lookup(chosen[mine]))
        loss = (encode_names(model, tiny.tokenize(texts[mine])) - target).square().sum() / NAMES
        loss.backward()
        text_group.step()
        return loss.item() * args.workers

    if rank == 0:
        draw = np.random.RandomState(VALIDATION_SEED)
        seen_labels = draw.randint(len(rows), size=2000)
        cells = rows[seen_labels] * faces + draw.randint(faces, size=2000)
        seen = glyphs.render(cells, glyphs.uniforms(VALIDATION_SEED, np.arange(2000)), CPU)
        run = glyphs.load()
        unseen, _ = run.test.read(np.arange(len(run.test)), tiny.IMAGE_SIZE, CPU)

    start, losses, text_losses = time.time(), [], []

    if args.names_only:
        model.load_state_dict(tiny.load_tiny(args.out).state_dict())
        draw = np.random.RandomState(args.seed)
        with torch.no_grad():
            every = rows.repeat(faces) * faces + np.tile(np.arange(faces), len(rows))
            features = [
                model.encode_image(
                    normalise(glyphs.render(part, draw.random_sample((len(part), glyphs.UNIFORMS)), CPU)),
                    normalize=True,
                )
                for part in np.array_split(every, 40)
            ]
        table.fit(names, F.normalize(torch.cat(features).view(len(rows), faces, -1).mean(1), dim=-1))

    def report(step: int) -> None:
        on_seen = accuracy(model, seen, torch.from_numpy(seen_labels), names)
        on_unseen = accuracy(model, unseen, torch.from_numpy(run.test.labels), list(run.class_names))
        loss = np.mean(losses[-args.every :]) if losses else math.nan  # --names-only has none
        print(
            f"step {step:5d}  {time.time() - start:5.0f} s  loss {loss:.3f}  "
            f"text {np.mean(text_losses[-args.every // ROUND :]):.3f}  scale {model.logit_scale.exp():.1f}  "
            f"accuracy: pre-training names {on_seen:.1f} %, default run {on_unseen:.1f} %",
            flush=True,
        )
        save(model, args.out)

    for step in range(image_steps):
        labels = rng.randint(len(rows), size=BATCH)
        cells = rows[labels] * faces + rng.randint(faces, size=BATCH)
        u = rng.random_sample((BATCH, glyphs.UNIFORMS))
        strength = MILD + (1 - MILD) * min(1, step / (GROWTH * args.steps))
        images = normalise(glyphs.render(cells[mine], u[mine], CPU, jitter(strength)))
        logits = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ table(*every_name).T
        loss = F.cross_entropy(logits, torch.from_numpy(labels[mine]), reduction="sum") / BATCH
        loss.backward()
        losses.append(loss.item() * args.workers)
        image_group.step()
        table_group.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if (step + 1) % ROUND == 0:
            text_losses.append(text_step())
        if rank == 0 and (step + 1) % args.every == 0:
            report(step + 1)
    for step in range(args.text_steps):
        text_losses.append(text_step())
        if rank == 0 and ((step + 1) % (4 * args.every) == 0 or step + 1 == args.text_steps):
            report(step + 1)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--text-steps", type=int, default=600, help="of the text tower alone, at the end")
    parser.add_argument("--names-only", action="store_true", help="go on from --out, with the text tower alone")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument("--every", type=int, default=400, help="steps between reports and saves")
    parser.add_argument("--out", type=Path, default=tiny.WEIGHTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (args, f"{folder}/store"), nprocs=args.workers)


if __name__ == "__main__":
    main()
