"""`fastmerge merge` on small files, against the merge rules on the concatenated vector, mergekit, and plain torch."""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge.__main__ import main
from fastmerge.config import Config
from fastmerge.files.rules import FILE_RULES
from fastmerge.merging import Base, build_rule

SHAPES = {"b.weight": (33, 17), "a.weight": (64, 50), "scale": (), "c.bias": (7,), "empty": (0, 3)}


def model(seed, dtype=torch.float32, like=None, step=1e-2):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in SHAPES.items():
        x = torch.randn(shape, generator=generator)
        x = x if like is None else like[name].float() + step * x
        made[name] = x.to(dtype)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of a base and three models, as fp32 files."""
    folder = tmp_path_factory.mktemp("models")
    base = model(0)
    save_file(base, folder / "base.safetensors")
    for k in range(1, 4):
        save_file(model(k, like=base), folder / f"m{k}.safetensors")
    return [folder / f"{name}.safetensors" for name in ("base", "m1", "m2", "m3")]


def flat(tensors):
    return torch.cat([tensors[name].reshape(-1).float() for name in sorted(tensors)])


def run(rule, files, out, *flags, base=True):
    start = ["--base", str(files[0])] if base else []
    return main(["merge", rule, "--models", *map(str, files[1:]), *start, "--out", str(out), *flags])


def of_rule(name, files, config=None, data=None):
    """The merge rule of the trainer, on the vector of all tensors sorted by name. data: what it needs of every model's."""
    every = [load_file(file) for file in files]
    shapes = [tuple(every[0][key].shape) for key in sorted(every[0])]
    sizes = [every[0][key].numel() for key in sorted(every[0])]
    bounds = [0, *itertools.accumulate(sizes)]
    rule = build_rule(name, Base(flat(every[0]), bounds, sizes, shapes=shapes), config or Config())
    for one, about in zip(every[1:], data or [None] * len(every), strict=False):
        rule.update(flat(one), about)
    return rule.merged(torch.empty_like(rule.base.theta))


@pytest.mark.parametrize("name", [name for name, rule in FILE_RULES.items() if rule.statistics is None])
def test_a_rule_is_the_same_on_files(name, files, tmp_path):
    given = files if FILE_RULES[name].most is None else files[:2]
    assert run(name, given, tmp_path / "out.safetensors") == 0
    found = load_file(tmp_path / "out.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
        k: (torch.Size(s), torch.float32) for k, s in SHAPES.items()
    }
    if name == "randmix":  # a stream of models draws other numbers: every entry comes from one of them
        models = torch.stack([flat(load_file(file)) for file in given[1:]])
        assert (models == flat(found)).any(0).all()
        assert ((models == flat(found)).float().mean(1) - 1 / 3).abs().max() < 0.05
    else:
        torch.testing.assert_close(flat(found), of_rule(name, given), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ties", "dare-ties", "knots"])
def test_the_sum_of_the_elected_sign(name, files, tmp_path):
    for how in ("sum", "mean"):
        assert run(name, files, tmp_path / f"{how}.safetensors", "--set", f"merge={how}") == 0
    found, mean = (flat(load_file(tmp_path / f"{how}.safetensors")) for how in ("sum", "mean"))
    config = Config()
    config.ties.merge = "sum"
    torch.testing.assert_close(found, of_rule(name, files, config), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, mean, atol=1e-3)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("zero", ["majority", "positive"])
def test_ties_of_whole_numbers(scope, zero, tmp_path):
    """Many equal magnitudes and masses of exactly zero: the cut and the majority must be those of the whole vector."""
    generator = torch.Generator().manual_seed(3)
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    models = [
        {name: torch.randint(-4, 4, shape, generator=generator).float() for name, shape in SHAPES.items()}
        for _ in range(2)
    ]
    found = fastmerge.merge(
        models, "ties", base=base, settings={"scope": scope, "zero": zero, "density": 0.6}, memory=1
    )
    config = Config()
    config.ties.scope, config.ties.zero, config.ties.density = scope, zero, 0.6
    bounds = [0]
    sizes = [base[name].numel() for name in sorted(base)]
    for n in sizes:
        bounds.append(bounds[-1] + n)
    rule = build_rule("ties", Base(flat(base), bounds, sizes), config)
    for one in models:
        rule.update(flat(one))
    assert torch.equal(flat(found), rule.merged(torch.empty(bounds[-1])))
    if zero == "majority":
        assert not torch.equal(
            flat(found),
            flat(
                fastmerge.merge(
                    models, "ties", base=base, settings={"scope": scope, "zero": "positive", "density": 0.6}
                )
            ),
        )


@pytest.mark.parametrize("name", ["breadcrumbs", "iso-c", "tsv"])
def test_weights_are_factors_of_task_vectors(name):
    base = model(0)
    models = [model(k, like=base) for k in (1, 2)]
    longer = {key: base[key] + 3 * (x - base[key]) for key, x in models[1].items()}
    found = fastmerge.merge(models, name, base=base, weights=[1, 3])
    expected = fastmerge.merge([models[0], longer], name, base=base)
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(flat(found), flat(fastmerge.merge(models, name, base=base)), atol=1e-3)
