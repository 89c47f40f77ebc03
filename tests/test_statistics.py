"""`fastmerge statistics` against plain loops over the images, and the merges that need it."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_commands import train
from test_merge_sweep import data  # noqa: F401 (a fixture)

import fastmerge
from fastmerge.__main__ import main
from fastmerge.data import load_dataset
from fastmerge.files.headers import read_header


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("runs") / "r"
    train(folder, data, "--tasks", 2, "--method", "finetune", "--model", "tiny", "--head", "text", "--keep-models")
    return folder / "finetune-seed0"


def test_fisher_and_moments_equal_plain_loops(run, data, tmp_path, capsys):  # noqa: F811
    path, dataset = run / "models" / "task-1.safetensors", load_dataset("folder", str(data))
    assert main(["statistics", "fisher", str(path), "--labels", "data", "--out", str(tmp_path / "f.safetensors")]) == 0
    assert main(["statistics", "moments", str(path), "--out", str(tmp_path / "m.safetensors")]) == 0
    model = fastmerge.load(path)
    classes = model.recipe["tasks"][0]["classes"]
    rows = [i for i, label in enumerate(dataset.train.labels) if label in classes]
    said = capsys.readouterr().out
    assert f"on {len(rows)} images of {model.recipe['tasks'][0]['name']}" in said
    pixels = torch.stack([dataset.train.read(torch.tensor([i]).numpy(), 32, torch.device("cpu"))[0][0] for i in rows])
    named = dict(model.backbone.named_parameters())
    squares = {name: torch.zeros_like(p) for name, p in named.items()}
    layer = next(n for n, m in model.backbone.named_modules() if isinstance(m, torch.nn.Linear) and "mlp" in n)
    inputs = []
    hook = model.backbone.get_submodule(layer).register_forward_pre_hook(
        lambda _, given: inputs.append(given[0].detach())
    )
    for image, i in zip(pixels, rows, strict=True):
        features = model.features(model.normalised(image[None]))
        logits = model.head(features, torch.tensor(classes))
        loss = F.cross_entropy(logits, torch.tensor([classes.index(int(dataset.train.labels[i]))]))
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            squares[name] += 0 if gradient is None else gradient**2 / len(rows)
    hook.remove()
    found = load_file(tmp_path / "f.safetensors")
    assert found.keys() == {f"backbone.{name}" for name, p in named.items() if p.requires_grad}
    for name, x in found.items():
        expected = squares[name.removeprefix("backbone.")]
        torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    moments = load_file(tmp_path / "m.safetensors")[f"backbone.{layer}.weight"]
    x = torch.cat([one.reshape(-1, one.shape[-1]) for one in inputs])
    torch.testing.assert_close(moments, x.T @ x / len(rows), rtol=1e-3, atol=1e-4 * float(moments.abs().max()))
    axes = json.loads(read_header(tmp_path / "m.safetensors")[1]["axes"])
    assert axes[f"backbone.{layer}.weight"] == 1 and set(axes.values()) == {0, 1}


def test_merges_with_them(run, tmp_path, capsys):
    """Models of two tasks, merged by their statistics, are scored."""
    models = [str(run / "models" / "task-1.safetensors"), str(run / "model.safetensors")]
    for kind, rule in (("fisher", "fisher"), ("moments", "regmean")):
        files = [str(tmp_path / f"{kind}{k}.safetensors") for k in (1, 2)]
        for model, file in zip(models, files, strict=True):
            assert main(["statistics", kind, model, "--images", "4", "--out", file]) == 0
        words = ["merge", rule, "--models", *models, "--statistics", *files]
        assert main([*words, "--out", str(tmp_path / rule)]) == 0
        assert main(["evaluate", str(tmp_path / rule), "--json"]) == 0
        one, two = map(load_file, files)
        assert one.keys() == two.keys() and not all(torch.equal(one[name], two[name]) for name in one)
    capsys.readouterr()
    for message, given in {
        "exists already": ["fisher", models[0], "--out", str(tmp_path / "fisher1.safetensors")],
        "expected a name that ends in": ["fisher", models[0], "--out", str(tmp_path / "x")],
        "--task 3: expected 1 to 2": ["fisher", models[0], "--task", "3", "--out", str(tmp_path / "x.safetensors")],
        "not the model of a finished run": ["fisher", str(tmp_path / "fisher1.safetensors"), "--out", "y.safetensors"],
    }.items():
        assert main(["statistics", *given]) == 2
        assert message in capsys.readouterr().err
