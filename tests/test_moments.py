"""Second moments of layer inputs against hooks on a tiny open_clip model and a tiny timm ViT, and the pass over a task."""

import pytest
import timm
import torch
import toy

from fastmerge.flat import FlatModel
from fastmerge.models import load_backbone
from fastmerge.models.inputs import InputMoments, linear_inputs
from fastmerge.moments_pass import MomentsPass


def hooked(backbone, images):
    """X^T X of every nn.Linear and nn.MultiheadAttention by hooks; of the latter's output projection by its weights."""
    found, handles = {}, []

    def note(name, x):
        rows = x.detach().double().flatten(0, -2)
        found[name] = rows.mT @ rows

    def attention(name, layer):
        def hook(_, args):
            q, k, v = torch.nn.functional.linear(args[0], layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
            split = [y.unflatten(-1, (layer.num_heads, -1)).transpose(-3, -2) for y in (q, k, v)]
            scores = (split[0] @ split[1].mT / split[0].shape[-1] ** 0.5).softmax(-1)
            note(f"{name}.in_proj_weight", args[0])
            note(f"{name}.out_proj.weight", (scores @ split[2]).transpose(-3, -2).flatten(-2))

        return hook

    for name, layer in backbone.named_modules():
        if isinstance(layer, torch.nn.MultiheadAttention):
            handles.append(layer.register_forward_pre_hook(attention(name, layer)))
        elif type(layer) is torch.nn.Linear:
            handles.append(layer.register_forward_pre_hook(lambda _, args, name=name: note(f"{name}.weight", args[0])))
    backbone(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("model", ["tiny", "test_vit"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_moments_equal_those_of_hooks(model, precision):
    assert timm.__version__
    backbone, _ = load_backbone(model, "none")
    backbone.eval()
    flat, size = FlatModel(backbone), backbone.image_size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    wanted = hooked(backbone, images)
    backbone.precision = precision
    with InputMoments(dict(zip(flat.names, flat.parameters, strict=True))) as mode:
        backbone(images)
    found = mode.totals
    if model == "tiny":  # `x @ proj` of pooled tokens
        assert mode.axes.pop("tower.proj") == 0 and found.pop("tower.proj").shape == (128, 128)
    assert found.keys() == wanted.keys() and set(mode.axes.values()) == {1} and len(found) >= 16
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    for name, moment in found.items():
        assert moment.dtype == torch.float32
        torch.testing.assert_close(
            moment.double(), wanted[name], rtol=0, atol=tolerance * float(wanted[name].abs().max()), msg=name
        )
    shapes = {name: weight.shape for name, weight in zip(flat.names, flat.parameters, strict=True)}
    for name, (length, axis) in linear_inputs(flat, size).items():
        assert shapes[name][axis] == length


@pytest.mark.parametrize("flags", [[], ["--micro-batch=3"]])
def test_the_pass_is_the_mean_over_images_and_goes_on(flags):
    learner = toy.learner(*flags)
    task, images = toy.tasks()[0]
    passes = [MomentsPass(learner, task, images) for _ in range(2)]
    passes[0].step(0)
    passes[1].load({name: x.clone() for name, x in passes[0].tensors().items()})
    for i in range(1, passes[0].steps):
        for each in passes:
            each.step(i)
    x = learner.plain(images.images).flatten(1).double()
    for name in ("inner.weight", "attn.qkv.weight"):
        torch.testing.assert_close(passes[0].result()[name].double(), x.mT @ x / len(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(passes[0].result()[name], passes[1].result()[name])
    assert set(passes[0].axes) == {"inner.weight", "outer.weight", "attn.qkv.weight"}
