"""Rules on files that need statistics of the data, against plain formulas in float64, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merge_files import files, model, of_rule  # noqa: F401 (a fixture)

import fastmerge
from fastmerge.config import Config
from fastmerge.errors import UserError

BASE = model(0)
MODELS = [model(k, like=BASE, step=0.5) for k in (1, 2, 3)]
FISHERS = [
    {name: torch.rand(x.shape, generator=torch.Generator().manual_seed(k)) for name, x in BASE.items()}
    for k in (5, 6, 7)
]
for one in FISHERS:  # no model knows anything of these entries
    one["a.weight"][0] = 0


def test_fisher_weighs_every_entry():
    found = fastmerge.merge(MODELS, "fisher", statistics=FISHERS, weights=[1, 2, 3], memory=1)
    for name, x in found.items():
        lam = [w * f[name].double() for w, f in zip((1, 2, 3), FISHERS, strict=True)]
        total, weighed = sum(lam), sum(f * m[name].double() for f, m in zip(lam, MODELS, strict=True))
        mean = sum(m[name].double() for m in MODELS) / 3
        expected = torch.where(total > 0, weighed / total, mean)
        torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)
    floor = fastmerge.merge(MODELS, "fisher", statistics=FISHERS, settings={"floor": 1e6})
    torch.testing.assert_close(floor["a.weight"], sum(m["a.weight"] for m in MODELS) / 3, rtol=1e-4, atol=1e-4)


def test_what_has_no_fisher_is_averaged_by_the_weights():
    fishers = [{name: f for name, f in one.items() if name != "c.bias"} for one in FISHERS]
    found = fastmerge.merge(MODELS, "fisher", statistics=fishers, weights=[1, 2, 3])
    expected = sum(w * m["c.bias"] for w, m in zip((1, 2, 3), MODELS, strict=True)) / 6
    torch.testing.assert_close(found["c.bias"], expected)


def test_fisher_and_cofima_are_those_of_a_training(files):  # noqa: F811
    """With every reading of `accumulate`, any parts, and bf16 statistics."""
    fishers = [{name: x.bfloat16() for name, x in one.items()} for one in FISHERS]
    flat = [torch.cat([one[name].flatten().float() for name in sorted(one)]) for one in fishers]
    for rule in ("fisher", "cofima"):
        for accumulate in ("sum", "ema", "last"):
            config = Config()
            getattr(config, rule).accumulate = accumulate
            expected = of_rule(rule, files, config, flat)
            settings = {"accumulate": accumulate}
            found = fastmerge.merge(files[1:], rule, statistics=fishers, settings=settings, memory=1)
            found = torch.cat([found[name].flatten() for name in sorted(found)])
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def grams(seed):
    generator = torch.Generator().manual_seed(seed)
    x = {"a.weight": torch.randn(70, 50, generator=generator), "b.weight": torch.randn(70, 33, generator=generator)}
    return {name: rows.T @ rows / 70 for name, rows in x.items()}


def test_regmean_with_alpha_1_and_few_images():
    """All of alpha's range is legal: 6 images and 9 inputs say nothing of 3 directions, where the average stays."""
    torch.manual_seed(1)
    images, models = torch.randn(2, 3, 9), torch.randn(2, 4, 9)
    found = fastmerge.merge(
        [{"w": w} for w in models], "regmean", statistics=[{"w": x.T @ x} for x in images], settings={"alpha": 1}
    )["w"]
    mean = models.mean(0)
    for w, x in zip(models, images, strict=True):
        torch.testing.assert_close(found @ x.T, w @ x.T, rtol=1e-3, atol=1e-3)  # nothing contradicts: the loss is 0
    blind = torch.linalg.svd(images.flatten(0, 1))[2][6:]
    torch.testing.assert_close(found @ blind.T, mean @ blind.T, rtol=1e-3, atol=1e-3)


def test_regmean_is_least_squares(tmp_path):
    """b.weight is used as x @ W: its first dimension is the input's."""
    data = [grams(k) for k in (1, 2)]
    for k, one in enumerate(data):
        save_file({f"module.{name}": gram for name, gram in one.items()}, tmp_path / f"{k}.safetensors")
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    found = fastmerge.merge(MODELS[:2], "regmean", statistics=paths, settings={"alpha": 0.7})
    for name in BASE:
        turn = (lambda x: x.double()) if name == "a.weight" else (lambda x: x.double().T)
        if name not in data[0]:
            torch.testing.assert_close(found[name], (MODELS[0][name] + MODELS[1][name]) / 2)
            continue
        shrunk = [0.7 * g[name].double() + 0.3 * torch.diag(g[name].double().diagonal()) for g in data]
        right = sum(g @ turn(m[name]).T for g, m in zip(shrunk, MODELS, strict=False))
        expected = torch.linalg.solve(sum(shrunk), right).T
        torch.testing.assert_close(turn(found[name]), expected, rtol=1e-4, atol=1e-4)


def test_a_square_weight_says_where_its_input_is(tmp_path):
    base = {"w": torch.zeros(4, 4)}
    models = [{"w": torch.randn(4, 4, generator=torch.Generator().manual_seed(k))} for k in (1, 2)]
    paths = []
    for k in (3, 4):
        x = torch.randn(9, 4, generator=torch.Generator().manual_seed(k))
        paths.append(tmp_path / f"{k}.safetensors")
        save_file({"w": x.T @ x}, paths[-1], metadata={"axes": json.dumps({"w": 0})})
    turned = [{"w": m["w"].T.contiguous()} for m in models]
    plain = [load_file(path) for path in paths]
    found = fastmerge.merge(models, "regmean", base=base, statistics=paths)["w"]
    torch.testing.assert_close(found.T, fastmerge.merge(turned, "regmean", statistics=plain)["w"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, fastmerge.merge(models, "regmean", statistics=plain)["w"], atol=1e-2)
    save_file({"w": x.T @ x}, paths[-1], metadata={"axes": '{"w": 2}'})
    with pytest.raises(UserError, match="its metadata `axes` must be JSON"):
        fastmerge.merge(models, "regmean", statistics=paths)


def test_what_is_missing_or_wrong_is_named():
    cases = {
        "--statistics is not given, but fisher needs the diagonal Fisher": ("fisher", []),
        "average needs no statistics": ("average", FISHERS),
        "2 for 3 models": ("fisher", FISHERS[:2]),
        "statistics 2: no tensor of model 2 has its names, such as x": (
            "fisher",
            [FISHERS[0], {"x": torch.ones(2)}, FISHERS[2]],
        ),
        "scale: not in the statistics statistics 3": (
            "fisher",
            [*FISHERS[:2], {name: x for name, x in FISHERS[2].items() if name != "scale"}],
        ),
        r"c.bias \[7\]: its statistics are .*\[6\].*; expected \[7\] floats": (
            "fisher",
            [*FISHERS[:2], FISHERS[2] | {"c.bias": torch.ones(6)}],
        ),
        r"a.weight \[64, 50\]: its statistics are \[49, 49\].*expected \[in, in\]": (
            "regmean",
            [{"a.weight": torch.ones(49, 49)}] * 3,
        ),
    }
    for message, (rule, data) in cases.items():
        with pytest.raises(UserError, match=message):
            fastmerge.merge(MODELS, rule, statistics=data)
    with pytest.raises(UserError, match="fisher has no setting 'labels'"):
        fastmerge.merge(MODELS, "fisher", statistics=FISHERS, settings={"labels": "data"})
    with pytest.raises(UserError, match="fisher needs positive"):
        fastmerge.merge(MODELS, "fisher", statistics=FISHERS, weights=[1, 2, 0])
