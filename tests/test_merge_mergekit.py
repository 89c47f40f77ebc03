"""`fastmerge merge --mergekit` against mergekit 0.1.5 itself, on the same files and the same config."""

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_merge_files import model

from fastmerge.__main__ import main
from fastmerge.errors import UserError
from fastmerge.files.mergekit import read_config

CONFIGS = {
    "linear": [{"weight": 1.0}, {"weight": 2.5}],
    "task_arithmetic": [{"weight": 0.3}, {"weight": 0.9}],
    "ties": [{"weight": 1.0, "density": 0.4}, {"weight": 2.0, "density": 0.4}],
    "model_stock": [{}, {}],
    "slerp": [{}, {"t": 0.3}],
    "nuslerp": [{"weight": 1.0}, {"weight": 3.0}],
    "breadcrumbs": [{"weight": 0.5, "density": 0.4, "gamma": 0.1}, {"weight": 1.0, "density": 0.4, "gamma": 0.1}],
    "karcher": [{}, {}],
}


@pytest.fixture
def folder(tmp_path):
    base = model(0)
    save_file(base, tmp_path / "base.safetensors")
    common = model(
        9, like=base, step=0.5
    )  # stock: negative cosines, of which mergekit makes something else, do not occur
    for k in (1, 2):
        save_file(model(k, like=common, step=0.2), tmp_path / f"m{k}.safetensors")
    return tmp_path


def config(folder, method, given, **more):
    models = ["base" if method == "slerp" else "m1", "m2"]
    entries = [{"model": str(folder / f"{m}.safetensors"), "parameters": p} for m, p in zip(models, given, strict=True)]
    if method == "slerp":
        more["parameters"] = entries[1]["parameters"]
        entries = [{"model": entry["model"]} for entry in entries]
    about = {"merge_method": method, "models": entries, **more}
    if method not in ("linear", "karcher"):
        about["base_model"] = str(folder / "base.safetensors")
    (folder / "config.yml").write_text(yaml.safe_dump(about))
    return about


@pytest.mark.parametrize("method", CONFIGS)
def test_equals_mergekit(method, folder, capsys):
    methods = pytest.importorskip("mergekit.merge_methods")
    about = config(folder, method, CONFIGS[method])
    assert main(["merge", "--mergekit", str(folder / "config.yml"), "--out", str(folder / "out.safetensors")]) == 0
    ours = load_file(folder / "out.safetensors")
    inputs = {one["model"]: load_file(one["model"]) for one in about["models"]}
    inputs = {name: {k: x for k, x in one.items() if x.numel()} for name, one in inputs.items()}
    start = {}
    if method not in ("linear", "karcher"):
        base = about["base_model"]
        inputs[base] = {k: x for k, x in load_file(base).items() if x.numel()}
        start = {"base": base}
    if method == "slerp":
        parameters = about["parameters"]
    else:
        names = {key for one in about["models"] for key in one["parameters"]}
        parameters = {key: {one["model"]: one["parameters"][key] for one in about["models"]} for key in names}
    with torch.no_grad():
        theirs = methods.merge_state_dicts(inputs, method, parameters=parameters, **start)
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-5, atol=5e-5 if method == "karcher" else 2e-6)
    assert not torch.equal(ours["a.weight"], load_file(folder / "m2.safetensors")["a.weight"])


LAYERS = {"embed.weight": (6, 3), "head.weight": (3, 6)} | {
    f"visual.blocks.{k}.{name}": (3, 4) for k in range(5) for name in ("attn.weight", "mlp.weight")
}
SPLIT = [{"filter": "attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.4}]
ALONG = {
    "linear": [{"weight": [1, 0.5, 0]}, {"weight": 0.5}],
    "task_arithmetic": [{"weight": [0, 1]}, {"weight": [{"filter": "attn", "value": [0.2, 0.3, 0.9]}, {"value": 1}]}],
    "ties": [{"weight": [0, 1], "density": [0.3, 1.0]}, {"weight": 2.0, "density": [0.3, 1.0]}],
    "slerp": [
        {},
        {"t": [{"filter": "attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.4}]},
    ],
}


@pytest.mark.parametrize("method", ALONG)
def test_gradients_equal_mergekit(method, tmp_path, monkeypatch):
    """Its own resolution of filters and gradients (config.py), with the places of its planner, tensor by tensor."""
    methods = pytest.importorskip("mergekit.merge_methods")
    from mergekit.config import ConditionalParameter, evaluate_setting

    generator, tensors = torch.Generator().manual_seed(4), {}
    for name in ("base", "m1", "m2"):
        tensors[name] = {key: torch.randn(shape, generator=generator) for key, shape in LAYERS.items()}
        save_file(tensors[name], tmp_path / f"{name}.safetensors")
    about = config(tmp_path, method, ALONG[method])
    assert main(["merge", "--mergekit", str(tmp_path / "config.yml"), "--out", str(tmp_path / "o.safetensors")]) == 0
    ours = load_file(tmp_path / "o.safetensors")

    def value(setting, name):
        if isinstance(setting, list) and isinstance(setting[0], dict):
            setting = [ConditionalParameter(**one) for one in setting]
        place = int(name.split(".")[2]) / 4 if "blocks" in name else 0  # plan_slice; pre_weights
        return evaluate_setting(name, setting, place, validate=float)

    for name in LAYERS:
        given = {one["model"]: its for one, its in zip(about["models"], ALONG[method], strict=True)}
        models = {path: {name: load_file(path)[name]} for path in given}
        if method == "slerp":
            parameters = {"t": value(SPLIT, name)}
        else:
            keys = {key for values in given.values() for key in values}
            parameters = {key: {path: value(values[key], name) for path, values in given.items()} for key in keys}
        start = {}
        if method != "linear":
            start = {"base": about["base_model"]}
            models[about["base_model"]] = {name: tensors["base"][name]}
        with torch.no_grad():
            theirs = methods.merge_state_dicts(models, method, parameters=parameters, **start)[name]
        torch.testing.assert_close(ours[name], theirs, rtol=1e-5, atol=2e-6)


def test_filters_and_dare(folder):
    given = [{"weight": [{"filter": "a.", "value": 3}, {"value": 1}], "density": 0.25}, {"weight": 1, "density": 0.25}]
    config(folder, "dare_linear", given, dtype="bfloat16")
    options = read_config(folder / "config.yml")
    assert (options.rule, options.dtype, options.weights) == ("dare", "bf16", [1.0, 1.0])
    assert options.settings == {"p": 0.75, "scale": 2.0}
    assert options.tensors == [".*a\\..*:scale=4.0,weights=3.0/1.0"]
    assert main(["merge", "--mergekit", str(folder / "config.yml"), "--out", str(folder / "o.safetensors")]) == 0
    assert load_file(folder / "o.safetensors")["a.weight"].dtype == torch.bfloat16


def test_what_cannot_be_read_is_named(folder):
    for method, more, message in (
        ("karchr", {}, "no merge_method 'karchr' here. Did you mean: karcher"),
        ("ties", {"parameters": {"normalize": False}}, "normalize: false is not here"),
        ("ties", {"parameters": {"weight": ["a", 0.9]}}, r"weight \['a', 0.9\]: expected a number, or numbers along"),
        ("ties", {"parameters": {"weight": [{"filter": "a"}]}}, "expected entries with `value:`"),
        ("sce", {"parameters": {"weight": 1}}, "parameter weight of sce"),
        ("breadcrumbs", {"parameters": {"density": [0.5, 1]}}, "reaches 1 along the layers"),
        (
            "task_arithmetic",
            {"parameters": {"weight": [0, 1], "normalize": True}},
            "whose sum changes along the layers",
        ),
        ("dare_linear", {"parameters": {"weight": [0, 1], "lambda": [1, 2]}}, "both changing along the layers"),
        ("ties", {"parameters": {"gamma": 1}}, "parameter gamma of ties"),
        ("ties", {"slices": []}, "slices is not read"),
        ("ties", {"dtype": "int8"}, "dtype 'int8'"),
    ):
        config(folder, method, [{}, {}], **more)
        with pytest.raises(UserError, match=message):
            read_config(folder / "config.yml")
    config(folder, "ties", [{"density": 0.1}, {"density": 0.2}])
    with pytest.raises(UserError, match="density differs between the models"):
        read_config(folder / "config.yml")
    by_name = [{"filter": "a", "value": 1}], [{"filter": "b", "value": 1}]
    config(folder, "ties", [{"weight": by_name[0]}, {"weight": by_name[1]}])
    with pytest.raises(UserError, match=r"filters of different order \(a; b\)"):
        read_config(folder / "config.yml")
