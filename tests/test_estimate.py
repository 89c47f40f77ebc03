"""What a command says that it will take, against counts by hand; and `--dry-run`."""

import torch

from fastmerge import estimate
from fastmerge.__main__ import main
from fastmerge.flags import parse
from fastmerge.plan import plan
from fastmerge.setup import Setup

CPU = torch.device("cpu")


def test_counts_of_the_default_run():
    """Five tasks of 720 training and 360 test images, 3 + 1 epochs of 12 steps; the search of the first task too."""
    setup = Setup(parse([]))
    runs = plan(setup.config, setup.scenario)
    trm, finetune, nearest = runs
    assert estimate.steps(trm) == {"train": 5 * 3 * 12, "merge": 5 * 12}
    assert estimate.steps(finetune) == {"train": 5 * 3 * 12, "merge": 0} and not any(estimate.steps(nearest).values())
    everything = estimate.decoding(runs, 32, 10**9)
    assert everything == (3 * 3600 + 1800, (3 * 3600 + 1800) * 3 * 32 * 32)
    tests = 3 * 360 * (1 + 2 + 3 + 4 + 5)
    assert estimate.decoding(runs, 32, 0)[0] == 3600 * (4 + 3 + 1) + tests  # streamed: in every epoch and evaluation
    numel = sum(p.numel() for p in setup.backbone.parameters())
    assert estimate.disk(runs, numel) == (3 * 4 * numel, (3 + 12) * 4 * numel)
    kept = parse(["--keep-trajectory", "--keep-models", "--method", "finetune", "--no-nearest-mean"])
    assert estimate.disk(plan(kept, setup.scenario), numel)[0] == (1 + 5 + 5) * 4 * numel


def test_memory_follows_the_images_at_once():
    setup = Setup(parse([]))

    def needed(*flags):
        return estimate.memory(plan(parse(list(flags)), setup.scenario), setup.backbone, CPU)

    whole, part = needed(), needed("--micro-batch", "16")
    assert whole["search"][0] > whole["training"][0] > part["training"][0] and whole["search"][1] == 64
    assert part["search"][1] == 16
    first_order = needed("--method", "trm", "--trm.lambda2", "0")
    assert first_order["search"][0] < whole["search"][0]
    assert needed("--method", "nearest-mean") == {}
    # the process grows by 0.80 MiB an image in training and 2.8 in the search (docs/LOG.md), its tensors by less
    rest = {kind: whole[kind][0] - part[kind][0] for kind in whole}
    assert 0.6 < rest["training"] / 48 / 2**20 < 1.5 and 1.4 < rest["search"] / 48 / 2**20 < 3.7


def test_memory_follows_checkpoint_gradients_and_the_number_of_processes(monkeypatch):
    setup = Setup(parse([]))

    def needed(*flags):
        config = parse(["--method", "finetune", "finetune:lr=1e-4", *flags])
        return estimate.memory(plan(config, setup.scenario), setup.backbone, CPU)["training"]

    whole, again = needed(), needed("--checkpoint-gradients")
    assert again[0] < whole[0] and again[1] == whole[1] == 64
    assert needed("--method", "finetune:checkpoint_gradients=true") == again
    assert not setup.backbone.recompute
    monkeypatch.setattr("fastmerge.ranks._ranks.size", 3, raising=False)
    assert needed()[1] == 22 and needed()[0] < whole[0]


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert main(["--dry-run", "--run-dir", str(tmp_path / "r")]) == 0
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    assert (
        "to do: 21.6 thousand training images in 360 steps, 3600 merging images in 60 steps, 19.1 thousand test" in out
    )
    assert "memory: training step about" in out and "search step about" in out and "disk: 10 MB at the end" in out
    assert main(["--dry-run", "--tasks", "99", "--run-dir", str(tmp_path / "r")]) == 2


def test_prompts_train_through_a_frozen_backbone():
    """Without a gradient and moments of the weights; a module behind the backbone needs none of its activations."""
    setup = Setup(parse([]))

    def needed(*flags):
        config = parse(["--no-nearest-mean", "--method", *flags])
        return estimate.memory(plan(config, setup.scenario), setup.backbone, CPU)

    weights = 4 * sum(p.numel() for p in setup.backbone.parameters())
    plain = needed("finetune")["training"][0]
    for flags in (["coda"], ["l2p"], ["average", "--prompt-length=8"]):
        assert abs(plain - needed(*flags)["training"][0] - 4 * weights) < 50_000  # the flat vector is padded
    assert needed("clip-adapter") == {}


def test_the_text_tower_counts_where_its_prompts_are_learned():
    """Oracle: what autograd saves in the tower for ten prompts, listed by hand."""
    setup = Setup(parse(["--method", "coop", "vpt", "attriclip", "maple", "rapf"]))
    text = setup.text

    def needed(*flags, its=text):
        config = parse(["--no-nearest-mean", "--method", *flags])
        return estimate.memory(plan(config, setup.scenario), setup.backbone, CPU, its)

    saved = {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x
        return x

    context = torch.zeros(3, text.width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        rows = text.rows(context, torch.arange(10))
    weights = {p.untyped_storage().data_ptr() for p in text.clip.parameters()}
    activations = sum(x.untyped_storage().nbytes() for place, x in saved.items() if place not in weights)
    assert rows.shape[0] == 10
    tower = sum(p.nbytes for p in text.clip.parameters())
    alone = needed("coop", its=None)["training"][0]
    ten = needed("coop")["training"][0] - alone - tower  # ten classes a task
    assert abs(ten - activations) < 0.05 * activations
    chunk = needed("vpt")["training"][0] - alone - tower  # 100 prompts: a chunk of 64 at a time
    assert abs(chunk - 6.4 * ten) < 0.01 * chunk
    assert needed("attriclip")["training"][0] == needed("vpt")["training"][0]
    assert needed("maple")["training"][0] > needed("coop")["training"][0]  # it trains through the image tower too
    assert needed("rapf") == {}
