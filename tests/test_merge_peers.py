"""`fastmerge merge` on files against mergekit 0.1.5 (its rules and its configs), peft 0.21.2, and plain loops in float64 over
whole models."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from fastmerge_kernels import reference
from safetensors.torch import load_file, save_file

from fastmerge.__main__ import main
from fastmerge.errors import UserError
from fastmerge.files.mergekit import DEFAULTS, METHODS, SHARED, SWITCHES, read_config
from fastmerge.merging.karcher import STEPS

SHAPES = {"b.weight": (40, 30), "a.bias": (17,), "c.scale": (), "b.bias": (513,), "tail": (1, 3, 5), "none": (0, 4)}
TIGHT = {"rtol": 0, "atol": 2e-6}
MODELS = ["m0.safetensors", "m1.safetensors", "m2.safetensors"]
BY_TENSOR = {"scope": "tensor", "zero": "positive"}  # how mergekit and peft trim and elect


@pytest.fixture
def files(tmp_path, monkeypatch):
    """base and three models in the working folder; returns their tensors. Task vectors share a part: Model Stock moves."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(3)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    common = {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
    models = [
        {n: t + common[n] + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in MODELS
    ]
    save_file(base, "base.safetensors")
    for name, model in zip(MODELS, models, strict=True):
        save_file(model, name)
    return base, models


def merge(rule, *arguments, models=MODELS, base="base.safetensors", weights=None, out="merged.safetensors", **settings):
    words = ["merge", rule, "--models", *models, "--out", out]
    words += ["--base", base] if base else []
    words += ["--weights", *map(str, weights)] if weights else []
    words += ["--set", *(f"{name}={value}" for name, value in settings.items())] if settings else []
    assert main([*words, *arguments]) == 0
    return load_file(out) if out.endswith(".safetensors") else out


def close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), **(tolerance or TIGHT), msg=name)


@pytest.fixture
def mergekit():
    methods = pytest.importorskip("mergekit.merge_methods")

    def run(method, models, base=None, weights=None, **parameters):
        inputs = {f"m{k}": m for k, m in enumerate(models)} | ({"base": base} if base else {})
        if weights:
            parameters["weight"] = {f"m{k}": w for k, w in enumerate(weights)}
        start = {"base": "base"} if base else {}
        with torch.no_grad():
            return methods.merge_state_dicts(inputs, method, parameters=parameters, **start)

    return run


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.5, 2.0)])
def test_equals_mergekit(files, mergekit, weights):
    base, models = files
    base, *models = [
        {n: t for n, t in m.items() if t.numel()} for m in (base, *models)
    ]  # mergekit cannot merge no entries
    for name, content in zip(["base.safetensors", *MODELS], [base, *models], strict=True):
        save_file(content, name)
    linear = mergekit("linear", models, weights=weights)
    close(merge("average", base=None, weights=weights, out="linear.safetensors"), linear)
    arithmetic = mergekit("task_arithmetic", models, base, weights)
    close(merge("task-arithmetic", weights=weights, out="arithmetic.safetensors", scale=1), arithmetic)
    for density in (0.2, 0.5, 1.0):
        ties = mergekit("ties", models, base, weights, density=density)
        close(merge("ties", weights=weights, out=f"ties{density}.safetensors", density=density, **BY_TENSOR), ties)
    for normalize, how in ((True, "mean"), (False, "sum")):
        ties = mergekit("ties", models, base, weights, density=0.5, normalize=normalize)
        found = merge("ties", weights=weights, out=f"ties-{how}.safetensors", density=0.5, merge=how, **BY_TENSOR)
        close(found, ties)
        every = {"weights": weights, "p": 0, "density": 1, "merge": how} | BY_TENSOR
        found = merge("dare-ties", out=f"dare-ties-{how}.safetensors", **every)
        close(found, mergekit("dare_ties", models, base, weights, normalize=normalize))
    if len(set(weights)) == 1:
        close(merge("stock", out="stock.safetensors"), mergekit("model_stock", models, base, filter_wise=False))
        two = mergekit("slerp", models[1:2], models[0], t=0.5)
        close(merge("slerp", models=MODELS[:2], base=None, out="slerp.safetensors"), two)
        karcher = mergekit("karcher", models)  # in fp32, and it stops at 1e-5
        close(merge("karcher", base=None, out="karcher.safetensors"), karcher, rtol=1e-5, atol=5e-5)
        for density in (0.3, 1.0):
            sce = mergekit("sce", models, base, select_topk=density)
            found = merge("sce", out=f"sce{density}.safetensors", density=density)
            for name in ("a.bias", "b.weight", "b.bias"):  # mergekit selects nothing of a tensor of few entries
                torch.testing.assert_close(found[name], sce[name], **TIGHT)
    pair = mergekit("nuslerp", models[:2], base, weights[1:])
    close(merge("nuslerp", models=MODELS[:2], weights=weights[1:], out="nuslerp.safetensors"), pair)
    crumbs = mergekit("breadcrumbs", models, base, weights, density=0.4, gamma=0.05)
    close(merge("breadcrumbs", weights=weights, out="c.safetensors", density=0.4, gamma=0.05, scale=1), crumbs)


def test_a_density_of_one_equals_mergekit(files, mergekit):
    """Breadcrumbs drops no outliers that it may keep, and SCE keeps what all models agree on."""
    base, models = files
    base, *models = [{n: m[n] for n in ("b.weight", "b.bias")} for m in (base, *models)]
    for model in models:
        model["b.weight"][:, 0] = base["b.weight"][:, 0] + 1
        model["b.bias"][1:] = base["b.bias"][1:]
    for name, content in zip(["base.safetensors", *MODELS], [base, *models], strict=True):
        save_file(content, name)
    for density, gamma in ((1.0, 0.3), (0.8, 0.5)):
        crumbs = mergekit("breadcrumbs", models, base, (1.0, 1.0, 1.0), density=density, gamma=gamma)
        close(merge("breadcrumbs", out=f"{density}.safetensors", density=density, gamma=gamma, scale=1), crumbs)
    sce = mergekit("sce", models, base, select_topk=1.0)
    assert (sce["b.weight"][:, 0] - base["b.weight"][:, 0]).abs().max() > 0.5
    close(merge("sce", out="sce.safetensors", density=1), sce)


def test_ties_equals_peft(files):
    rules = pytest.importorskip("peft.utils.merge_utils")
    base, models = files
    found = merge("ties", density=0.4, **BY_TENSOR)
    for name in ("b.weight", "b.bias"):  # peft keeps no entry of a tensor with fewer than 1 / density
        deltas = [m[name] - base[name] for m in models]
        expected = base[name] + rules.ties(deltas, torch.ones(3), 0.4, "total")
        torch.testing.assert_close(found[name], expected, **TIGHT)


def whole(tensors):
    """All entries in the order of the sorted names, float64."""
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def test_ties_over_the_whole_model(files):
    """Trimmed over all tensors together, as in the paper."""
    base, models = files
    start, deltas = whole(base), [whole(m) - whole(base) for m in models]
    kept, n = [], len(start)
    for delta in deltas:
        keep = torch.zeros(n, dtype=torch.bool)
        keep[delta.abs().argsort(descending=True)[: int(0.2 * n)]] = True
        kept.append(torch.where(keep, delta, 0))
    expected = start.clone()
    for i in range(n):
        values = [float(d[i]) for d in kept if d[i] != 0]
        sign = 1 if sum(values) >= 0 else -1
        agree = [v for v in values if v * sign > 0]
        expected[i] += sum(agree) / len(agree) if agree else 0.0
    torch.testing.assert_close(whole(merge("ties", density=0.2)), expected, **TIGHT)


def test_magmax_in_float64(files):
    base, models = files
    deltas = torch.stack([whole(m) - whole(base) for m in models])
    chosen = deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]
    torch.testing.assert_close(whole(merge("magmax", scale=0.5)), whole(base) + 0.5 * chosen, **TIGHT)


def test_dare_draws_by_position_in_the_sorted_whole(files):
    """The masks are those of the float64 reference over the concatenated model."""
    base, models = files
    start, p = whole(base), 0.3
    expected = start.clone()
    for k, model in enumerate(models):
        dropped = reference.dare_delta(whole(model).float(), p, initial=start.float(), seed=5, subsequence=1 + k)
        expected += dropped.double() / 3
    found = merge("dare", "--seed", "5", p=p, scale=1)
    torch.testing.assert_close(whole(found), expected, **TIGHT)


BITS = [
    ("average", {}),
    ("magmax", {}),
    ("dare", {"p": 0.5}),
    ("dare-ties", {"p": 0.5, "density": 0.3}),
    ("randmix", {}),
    ("ties", {}),
    ("stock", {}),
    ("slerp", {}),
    ("della", {"scope": "tensor"}),
    ("opcm", {}),
    ("knots", {}),
    ("tsv", {}),
]


@pytest.mark.parametrize(("rule", "settings"), BITS, ids=[rule for rule, _ in BITS])
def test_sharding_order_and_memory_change_no_bit(files, tmp_path, monkeypatch, rule, settings):
    base, models = files
    first = merge(rule, **settings)
    monkeypatch.setattr("fastmerge.files.plan.LARGEST_PART", 177)  # entries, so that tensors have several parts
    monkeypatch.setattr("fastmerge.files.plan.SMALLEST_PART", 1)
    for k, model in enumerate([base, *models]):  # every input in shards of its own, in another order
        folder = tmp_path / f"shards{k}"
        folder.mkdir()
        names, places = sorted(model, reverse=k % 2 == 0), {}
        for part in range(1 + k):
            group = names[part :: 1 + k]
            save_file({name: model[name] for name in group}, folder / f"s{part}.safetensors")
            places |= {name: f"s{part}.safetensors" for name in group}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    other = [f"shards{k}" for k in (1, 2, 3)]
    found = merge(rule, "--max-memory", "1KB", "--shard", "2KB", models=other, base="shards0", out="pieces", **settings)
    second = {}
    for path in sorted((tmp_path / found).glob("*.safetensors")):
        second |= load_file(path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_of_mixed_dtypes_are_merged_in_fp32(files):
    _, models = files
    halves = [
        {n: t.to(kind) for n, t in m.items()} for m, kind in zip(models, (torch.bfloat16, torch.float16), strict=False)
    ]
    for name, model in zip(MODELS, halves, strict=False):
        save_file(model, name)
    found = merge("average", "--dtype", "bf16", base=None, weights=(1, 1, 1))
    for name in SHAPES:
        exact = (halves[0][name].double() + halves[1][name].double() + models[2][name].double()) / 3
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name].double(), exact, rtol=2**-8 * 1.01, atol=1e-6)


def test_inputs_are_unchanged(files, tmp_path):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("*.safetensors")}
    for rule in ("ties", "dare", "slerp", "average"):
        merge(rule, out=f"out/{rule}.safetensors")
    assert {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("*.safetensors")
    } == before


LAYERS = {"embed.weight": (6, 3), "head.weight": (3, 6)} | {
    f"visual.blocks.{k}.{name}": (3, 4) for k in range(5) for name in ("attn.weight", "mlp.weight")
}
SPLIT = [{"filter": "attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.4}]
ALONG = {
    "linear": [{"weight": [1, 0.5, 0]}, {"weight": 0.5}],
    "task_arithmetic": [{"weight": [0, 1]}, {"weight": [{"filter": "attn", "value": [0.2, 0.3, 0.9]}, {"value": 1}]}],
    "ties": [{"weight": [0, 1], "density": [0.3, 1.0]}, {"weight": 2.0, "density": [0.3, 1.0]}],
    "slerp": [{}, {"t": SPLIT}],
    "nuslerp": [{"weight": [1, 0.2]}, {"weight": 3.0}],
    "breadcrumbs": [{"weight": 0.5, "density": [0.3, 1.0], "gamma": 0.2}, {"density": [0.3, 1.0], "gamma": 0.2}],
    "dare_linear": [{"weight": 0.5}, {"weight": 2.0}],  # of density 1: nothing is random
    "dare_ties": [{"weight": 0.5}, {"weight": [2.0, 1.0]}],
    "sce": [{"select_topk": [0.4, 1.0]}] * 2,
    "model_stock": [{}, {}],
    "karcher": [{}, {}],
}


def config(folder, method, given, **more):
    models = ["base" if method == "slerp" else "m1", "m2"]
    entries = [{"model": str(folder / f"{m}.safetensors"), "parameters": p} for m, p in zip(models, given, strict=True)]
    if method in ("slerp", "sce"):  # shared parameters
        more.setdefault("parameters", given[1])
        entries = [{"model": entry["model"]} for entry in entries]
    about = {"merge_method": method, "models": entries, **more}
    if method not in ("linear", "karcher"):
        about.setdefault("base_model", str(folder / "base.safetensors"))
    (folder / "config.yml").write_text(yaml.safe_dump(about))
    return about


@pytest.fixture
def folder(tmp_path):
    """base, m1 and m2 of LAYERS, with task vectors that share a part."""
    generator = torch.Generator().manual_seed(4)
    base, common = ({key: torch.randn(shape, generator=generator) for key, shape in LAYERS.items()} for _ in range(2))
    save_file(base, tmp_path / "base.safetensors")
    for name in ("m1", "m2"):
        model = {
            key: x + 0.5 * common[key] + 0.2 * torch.randn(x.shape, generator=generator) for key, x in base.items()
        }
        save_file(model, tmp_path / f"{name}.safetensors")
    return tmp_path


CONFIGS = [(method, {}) for method in ALONG] + [
    (method, {"normalize": normalize})
    for method in ("ties", "dare_linear", "dare_ties", "task_arithmetic", "breadcrumbs")
    for normalize in (True, False)
    if (method, normalize) != ("task_arithmetic", True)  # its weights have another sum in every layer
]


@pytest.mark.parametrize(("method", "shared"), CONFIGS, ids=lambda x: str(x).replace(" ", ""))
def test_configs_equal_mergekit(method, shared, folder):
    """Its own resolution of filters and gradients (config.py), with the places of its planner, tensor by tensor."""
    methods = pytest.importorskip("mergekit.merge_methods")
    from mergekit.config import ConditionalParameter, evaluate_setting

    about = config(folder, method, ALONG[method], **({"parameters": shared} if shared else {}))
    assert main(["merge", "--mergekit", str(folder / "config.yml"), "--out", str(folder / "o.safetensors")]) == 0
    ours = load_file(folder / "o.safetensors")
    given = {one["model"]: its for one, its in zip(about["models"], ALONG[method], strict=True)}
    tensors = {path: load_file(path) for path in (*given, str(folder / "base.safetensors"))}
    start = {"base": about["base_model"]} if "base_model" in about else {}

    def value(setting, name):
        if isinstance(setting, list) and isinstance(setting[0], dict):
            setting = [ConditionalParameter(**one) for one in setting]
        place = int(name.split(".")[2]) / 4 if "blocks" in name else 0  # plan_slice; pre_weights
        return evaluate_setting(name, setting, place, validate=float)

    for name in LAYERS:
        models = {path: {name: tensors[path][name]} for path in dict.fromkeys((*given, *start.values()))}
        parameters = {k: x if isinstance(x, bool) else value(x, name) for k, x in about.get("parameters", {}).items()}
        keys = {key for values in given.values() for key in values} - parameters.keys()
        parameters |= {key: {p: value(values.get(key, 1.0), name) for p, values in given.items()} for key in keys}
        with torch.no_grad():
            theirs = methods.merge_state_dicts(models, method, parameters=parameters, **start)[name]
        torch.testing.assert_close(ours[name], theirs, rtol=1e-5, atol=5e-5 if method == "karcher" else 2e-6)
        assert method == "slerp" or not torch.equal(ours[name], tensors[str(folder / "base.safetensors")][name])


def test_defaults_are_those_of_mergekit():
    """Of every parameter of its methods that a config may leave out."""
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    specs = {method.spec.name: method.spec for method in registry.registered_methods()}
    fixed = {"int8_mask": False, "max_iter": STEPS, "tol": 1e-5}
    idle = {("task_arithmetic", "density"), ("task_arithmetic", "rescale")}  # it drops nothing
    shared = set()
    for method in METHODS:
        theirs = {p.name: p.default for p in specs[method].parameters if not p.required}
        ours = DEFAULTS.get(method, {}) | SWITCHES.get(method, {})
        assert ours.keys() - theirs.keys() <= {"t"}, method  # mergekit has no default for it
        for name, default in theirs.items():
            assert (method, name) in idle or (ours | fixed)[name] == default, (method, name)
        shared |= {p.name for p in specs[method].shared_parameters} - fixed.keys()
    assert shared == SHARED


def test_filters_and_dare(folder):
    given = [
        {"weight": [{"filter": "attn.", "value": 3}, {"value": 1}], "density": 0.25},
        {"weight": 1, "density": 0.25},
    ]
    config(folder, "dare_linear", given, dtype="bfloat16")
    options = read_config(folder / "config.yml")
    assert (options.rule, options.dtype, options.weights) == ("dare", "bf16", [1.0, 1.0])
    assert options.settings == {"p": 0.75, "scale": 2.0}
    assert options.tensors == [".*attn\\..*:scale=4.0,weights=3.0/1.0"]
    assert main(["merge", "--mergekit", str(folder / "config.yml"), "--out", str(folder / "o.safetensors")]) == 0
    assert load_file(folder / "o.safetensors")["head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("listed", [("base", "m1"), ("m1", "m2")])
@pytest.mark.parametrize("method", ["linear", "karcher"])
def test_a_base_without_task_vectors_is_one_more_model(method, listed, folder):
    """As mergekit's planner has it: a base_model that is not among the models is added to them."""
    methods = pytest.importorskip("mergekit.merge_methods")
    models = {name: load_file(folder / f"{name}.safetensors") for name in dict.fromkeys((*listed, "base"))}
    shared = {"weight": 1.0} if method == "linear" else {}
    paths = {name: str(folder / f"{name}.safetensors") for name in models}
    about = {"merge_method": method, "models": [{"model": paths[m]} for m in listed], "base_model": paths["base"]}
    (folder / "config.yml").write_text(yaml.safe_dump(about | {"parameters": shared}))
    assert main(["merge", "--mergekit", str(folder / "config.yml"), "--out", str(folder / "o.safetensors")]) == 0
    parameters = {key: dict.fromkeys(models, value) for key, value in shared.items()}
    theirs = methods.merge_state_dicts(models, method, parameters=parameters, base="base")
    for name, tensor in load_file(folder / "o.safetensors").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=5e-5)
    if method == "linear" and "base" not in listed:
        (folder / "config.yml").write_text(yaml.safe_dump(about))
        with pytest.raises(UserError, match="takes base_model as one more model; name it in models with its weight"):
            read_config(folder / "config.yml")


def test_what_cannot_be_read_is_named(folder):
    for method, more, message in (
        ("karchr", {}, "no merge_method 'karchr' here. Did you mean: karcher"),
        ("linear", {"parameters": {"normalize": False}}, "normalize: false is not here"),
        ("ties", {"parameters": {"normalize": [True, False]}}, r"normalize \[True, False\]: expected true or false"),
        ("ties", {"parameters": {"weight": ["a", 0.9]}}, r"weight \['a', 0.9\]: expected a number, or numbers along"),
        ("ties", {"parameters": {"weight": [{"filter": "a"}]}}, "expected entries with `value:`"),
        ("sce", {"parameters": {"weight": 1}}, "parameter weight of sce"),
        (
            "task_arithmetic",
            {"parameters": {"weight": [0, 1], "normalize": True}},
            "whose sum changes along the layers",
        ),
        ("dare_linear", {"parameters": {"weight": [0, 1], "lambda": [1, 2]}}, "both changing along the layers"),
        ("dare_linear", {"parameters": {"rescale": False}}, "dare_linear with rescale: false is not here"),
        ("dare_ties", {"parameters": {"rescale": False}}, "dare_ties with rescale: false is not here"),
        ("ties", {"parameters": {"rescale": True}}, "ties with rescale: true is not here"),
        ("breadcrumbs", {"parameters": {"rescale": True}}, "breadcrumbs with rescale: true is not here"),
        ("model_stock", {"parameters": {"filter_wise": True}}, "filter_wise: true is not here"),
        ("nuslerp", {"parameters": {"nuslerp_flatten": False}}, "nuslerp_flatten: false is not here"),
        ("ties", {"parameters": {"gamma": 1}}, "parameter gamma of ties"),
        ("ties", {"slices": []}, "slices is not read"),
        ("ties", {"dtype": "int8"}, "dtype 'int8'"),
    ):
        config(folder, method, [{}, {}], **more)
        with pytest.raises(UserError, match=message):
            read_config(folder / "config.yml")
    config(folder, "ties", [{"lambda": 0.5}, {"lambda": 0.5}])
    with pytest.raises(UserError, match="lambda is a parameter of one model, where mergekit does not read it"):
        read_config(folder / "config.yml")
    for method, value in (("task_arithmetic", True), ("sce", False), ("dare_ties", True)):  # changes nothing
        config(folder, method, [{}, {}], parameters={"rescale": value, "int8_mask": True})
        assert read_config(folder / "config.yml").rule == METHODS[method]
    config(folder, "ties", [{}, {}], base_model="b", models=[{"model": "b"}])
    with pytest.raises(UserError, match="no model beside base_model"):
        read_config(folder / "config.yml")
    config(folder, "ties", [{"density": 0.1}, {"density": 0.2}])
    with pytest.raises(UserError, match="density differs between the models"):
        read_config(folder / "config.yml")
    by_name = [{"filter": "a", "value": 1}], [{"filter": "b", "value": 1}]
    config(folder, "ties", [{"weight": by_name[0]}, {"weight": by_name[1]}])
    with pytest.raises(UserError, match=r"filters of different order \(a; b\)"):
        read_config(folder / "config.yml")
