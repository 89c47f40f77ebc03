"""`--checkpoint-gradients` against steps that keep all activations: the same bits, less memory."""

import pytest
import torch
import toy
from test_parts import LiveBytes
from test_precision import images_for, tower

from fastmerge.__main__ import main
from fastmerge.errors import UserError
from fastmerge.fisher_pass import FisherPass
from fastmerge.methods.trm import TRM
from fastmerge.models.recompute import checkpoint_blocks
from fastmerge.parts import saved_bytes
from fastmerge.setup import Setup
from fastmerge.training import Train

# open_clip's own tower (also tiny), and timm's
TOWERS = [("tiny", "glyphs"), ("test_vit", "none")]


@pytest.mark.parametrize("flags", [[], ["--precision=bf16"], ["--lora-rank=2"]])
@pytest.mark.parametrize(("name", "weights"), TOWERS)
def test_a_training_step_has_the_same_bits_and_needs_less(name, weights, flags):
    gradients, peaks, saved = [], [], []
    for more in ([], ["--checkpoint-gradients"]):
        learner = tower(name, weights, *flags, *more, "--batch-size=16", "--clip=0")
        train = Train(learner, toy.tasks()[0][0], images_for(learner, 16))
        train.optimiser.step = lambda: None
        with LiveBytes() as live:
            train.step(0)
        gradients.append(train.gradient.clone())
        peaks.append(live.peak)
        saved.append(saved_bytes(learner.flat, learner.backbone.image_size, "train"))
        assert saved_bytes(learner.flat, learner.backbone.image_size, "tangent") >= saved[0]
    assert gradients[0].any() and torch.equal(*gradients)
    assert peaks[1] < 0.75 * peaks[0] and saved[1] < 0.6 * saved[0]


@pytest.mark.parametrize("flags", [["--trm.lambda2=0"], [], ["--trm.curvature=difference"]])
def test_a_search_step_has_the_same_bits(flags):
    found = []
    for more in ([], ["--checkpoint-gradients"]):
        config = toy.parse(["--batch-size=8", "--device=cpu", *flags, *more])
        setup = Setup(config)
        task = setup.scenario.tasks[1]
        learner = setup.learner(0)
        previous = learner.theta.clone()
        noise = torch.randn(previous.shape, generator=torch.Generator().manual_seed(1))
        learner.theta.add_(1e-3 * noise * (previous != 0))
        images = setup.cache.get(setup.dataset.train, task.train[:16])
        search = TRM(learner).merge(task, images, {"previous": previous})
        terms = search.step(0)
        found.append(torch.stack([terms[name].double() for name in terms] + list(search.coefficients.grad.double())))
    assert torch.equal(*found)


def test_the_fisher_pass_keeps_activations():
    found = []
    for more in ([], ["--checkpoint-gradients"]):
        learner = tower("tiny", "glyphs", "--batch-size=4", *more)
        passed = FisherPass(learner, toy.tasks()[0][0], images_for(learner), labels="data")
        passed.step(0)
        found.append(passed.result())
        assert learner.backbone.recompute == bool(more)
    assert torch.equal(*found)


def test_a_model_without_blocks(tmp_path, capsys):
    row = "--model test_resnet --pretrained none --method finetune:checkpoint_gradients=true --device cpu --run-dir"
    assert main([*row.split(), str(tmp_path / "r")]) == 2
    assert "test_resnet has no list of transformer blocks" in capsys.readouterr().err and not (tmp_path / "r").exists()
    with pytest.raises(
        UserError, match="--checkpoint-gradients: model test_resnet has no list .* choose a ViT, or --micro"
    ):
        checkpoint_blocks(tower("test_resnet", "none").backbone)
