"""A config.yml of mergekit 0.1.5 as options of a merge, for the methods that both have.

    mergekit           fastmerge
    linear             average                (normalize: true, its default)
    task_arithmetic    task-arithmetic        scale = lambda; weights
    ties               ties                   scope=tensor zero=positive scale=lambda; weights
    dare_linear        dare                   p = 1 - density, scale = lambda * sum of the weights; weights
    dare_ties          dare-ties              p = 1 - density, density=1, the others of ties but merge=sum; weights
    breadcrumbs        breadcrumbs            density, gamma, scale = lambda; weights
    sce                sce                    density = select_topk
    model_stock        stock
    karcher            karcher
    slerp              slerp                  weights 1 - t, t
    nuslerp            nuslerp                weights

linear and karcher take a base_model as one of the models; the others have their task vectors from it.
normalize sets `merge` of ties and dare-ties (mean or sum); elsewhere it changes the weights or the scale.

The results agree up to rounding except DARE: mergekit draws its masks from torch's generator, and rescales so that the
L1 norm stays; ours are a function of seed and position, divided by 1 - p (the paper).

Where a value is a list of filters, the first that is part of a tensor's name counts; a list of numbers goes along the layers
(layers.py); a model's own parameter comes before the shared one. Slices are not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastmerge.errors import UserError, nearest
from fastmerge.files.layers import BETWEEN, Gradient
from fastmerge.files.plan import Options

METHODS = {
    "linear": "average",
    "task_arithmetic": "task-arithmetic",
    "ties": "ties",
    "dare_linear": "dare",
    "dare_ties": "dare-ties",
    "breadcrumbs": "breadcrumbs",
    "sce": "sce",
    "model_stock": "stock",
    "karcher": "karcher",
    "slerp": "slerp",
    "nuslerp": "nuslerp",
}
WITHOUT_BASE = {"linear", "karcher"}  # a base_model is one more model of them
WEIGHTED = {"linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "nuslerp"}
DEFAULTS: dict[str, dict[str, float]] = {  # of the parameters that are one for all models
    "task_arithmetic": {"lambda": 1.0},
    "ties": {"lambda": 1.0, "density": 1.0},
    "dare_linear": {"lambda": 1.0, "density": 1.0},
    "dare_ties": {"lambda": 1.0, "density": 1.0},
    "breadcrumbs": {"lambda": 1.0, "density": 1.0, "gamma": 0.01},
    "sce": {"select_topk": 1.0},
    "slerp": {"t": 0.5},
}
SWITCHES: dict[str, dict[str, bool]] = {  # the defaults of the parameters that are true or false
    "linear": {"normalize": True},
    "task_arithmetic": {"normalize": False},
    "ties": {"normalize": True, "rescale": False},
    "dare_linear": {"normalize": False, "rescale": True},
    "dare_ties": {"normalize": False, "rescale": True},
    "breadcrumbs": {"normalize": False, "rescale": False},
    "model_stock": {"filter_wise": False},
    "nuslerp": {"nuslerp_row_wise": False, "nuslerp_flatten": True},
}
BOTH = {"task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs"}  # have normalize true and false here
SHARED = {"normalize", "rescale", "lambda", "select_topk", "t", "filter_wise", "nuslerp_row_wise", "nuslerp_flatten"}
FIXED: dict[str, dict[str, Any]] = {  # settings that mergekit has no choice of
    "ties": {"scope": "tensor", "zero": "positive"},
    "dare_ties": {"density": 1.0, "scope": "tensor", "zero": "positive"},
}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
FREE = {"int8_mask", "normalize", "rescale"}  # parameters that change nothing where a method has no switch of that name
BESIDE = {"tokenizer_source", "tokenizer", "chat_template", "name"}  # of the config, not of the weights
KNOWN = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype"}

Values = tuple[float, ...]  # along the layers; one where they do not change
Made = tuple[dict[str, Values], list[Values]]  # settings, weights
Choice = list[
    tuple[str | None, Values]
]  # filter -> values; the first that fits counts, None fits always and is the last


def read_config(path: Path) -> Options:
    """Options of a mergekit config.

    Raises:
        UserError: it cannot be read, or asks for what fastmerge has not.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--mergekit {path}: cannot read it ({str(error).splitlines()[0]})") from None
    if not isinstance(config, dict) or not isinstance(config.get("models"), list) or "merge_method" not in config:
        raise UserError(f"--mergekit {path}: expected merge_method and a list of models (slices are not read)")
    method = config["merge_method"]
    if method not in METHODS:
        close = nearest(str(method), METHODS)
        raise UserError(f"--mergekit {path}: no merge_method {method!r} here.{close} There are: {', '.join(METHODS)}")
    unknown = sorted(config.keys() - KNOWN - BESIDE)
    if unknown:
        raise UserError(f"--mergekit {path}: {unknown[0]} is not read; expected {', '.join(sorted(KNOWN))}")
    return _options(path, config, method)


def _options(path: Path, config: dict[str, Any], method: str) -> Options:
    shared, base = config.get("parameters") or {}, config.get("base_model")
    models = list(config["models"])
    try:
        if method not in {*WITHOUT_BASE, "slerp"}:
            models = [one for one in models if one["model"] != base]
        elif method in WITHOUT_BASE and base is not None and base not in [one["model"] for one in models]:
            models.append({"model": base})
            if method in WEIGHTED and "weight" not in shared:
                raise UserError(
                    f"--mergekit {path}: {method} takes base_model as one more model; name it in models with its weight, or "
                    "leave it out"
                )
        names = [str(one["model"]) for one in models]
        own: list[dict[str, Any]] = [{**(one.get("parameters") or {})} for one in models]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"--mergekit {path}: every entry of models needs `model:`, a path") from None
    where = f"--mergekit {path}"
    if not names:
        raise UserError(f"{where}: no model beside base_model; name in models what is merged")
    for name, usual in SWITCHES.get(method, {}).items():
        value = shared.get(name, usual)
        if not isinstance(value, bool):
            raise UserError(f"{where}: {name} {value!r}: expected true or false, for all tensors")
        if value != usual and not (name == "normalize" and method in BOTH):
            raise UserError(f"{where}: {method} with {name}: {str(value).lower()} is not here; leave it out")
    if misplaced := sorted({key for one in own for key in one} & SHARED):
        raise UserError(
            f"{where}: {misplaced[0]} is a parameter of one model, where mergekit does not read it; put it under the "
            "parameters of the config"
        )
    normalize: bool = shared.get("normalize", SWITCHES.get(method, {}).get("normalize", False))
    numbers = {*DEFAULTS.get(method, {}), *({"weight"} if method in WEIGHTED else ())}
    free = FREE | SWITCHES.get(method, {}).keys() | ({"density"} if method == "linear" else set())
    unknown = {key for one in (shared, *own) for key in one} - numbers - free
    if unknown:
        raise UserError(f"--mergekit {path}: parameter {min(unknown)} of {method} is not here")
    found = Options(METHODS[method], names, None if method in WITHOUT_BASE else base)
    if config.get("out_dtype") or config.get("dtype"):
        word = config.get("out_dtype") or config["dtype"]
        if word not in DTYPES:
            raise UserError(f"--mergekit {path}: dtype {word!r}: expected one of {', '.join(DTYPES)}")
        found.dtype = DTYPES[word]
    if method == "slerp":
        if base not in names or len(names) != 2:
            raise UserError(f"--mergekit {path}: slerp needs two models, one of them the base_model")
        found.models, found.base = [base, next(name for name in names if name != base)], None
    if method == "nuslerp" and (base is None or len(names) != 2):
        raise UserError(f"--mergekit {path}: nuslerp needs base_model and two other models here")
    found.settings = dict(FIXED.get(method, {}))
    if method in ("ties", "dare_ties"):
        found.settings["merge"] = "mean" if normalize else "sum"

    weights = [_choice(where, "weight", one, shared, 1.0) for one in own]
    given: dict[str, Choice] = {}
    for name, default in DEFAULTS.get(method, {}).items():
        every = [_choice(where, name, one, shared, default) for one in own]
        if any(choice != every[0] for choice in every):
            raise UserError(f"{where}: {name} differs between the models, and {METHODS[method]} takes one")
        given[name] = every[0]

    def put(choices: Sequence[Choice], made_of: Callable[..., Made]) -> None:
        """Set what `made_of` makes of the values, for the tensors of every filter."""
        for word, values in _by_filter(where, choices):
            settings, shares = made_of(*values)
            words = {} if word is None else {key: _text(value) for key, value in settings.items()}
            if word is None:
                found.settings |= {
                    key: value[0] if len(value) == 1 else _text(value) for key, value in settings.items()
                }
            if word is None and all(len(share) == 1 for share in shares):
                found.weights = [share[0] for share in shares] or found.weights
            elif shares:
                words["weights"] = "/".join(map(_text, shares))
            if words:
                pattern = ".*" if word is None else f".*{re.escape(word)}.*"
                text = ",".join(f"{key}={value}" for key, value in words.items())
                found.tensors.insert(0, f"{pattern}:{text}")  # here the last match counts

    def setting(key: str, change: Callable[[float], float] = float) -> Callable[..., Made]:
        return lambda values: ({key: tuple(map(change, values))}, [])

    if method == "slerp":
        put([given["t"]], lambda t: ({}, [tuple(1 - x for x in t), t]))
    if "lambda" in given and method != "dare_linear":
        put([given["lambda"]], setting("scale"))
    if "select_topk" in given:
        put([given["select_topk"]], setting("density"))
    if method in ("dare_linear", "dare_ties"):
        put([given["density"]], setting("p", lambda density: 1 - density))
    if method == "ties":
        put([given["density"]], setting("density"))
    if method == "breadcrumbs":
        put([given["density"], given["gamma"]], lambda density, gamma: ({"density": density, "gamma": gamma}, []))
    if method == "dare_linear":
        put([given["lambda"], *weights], lambda scale, *each: _dare(where, normalize, scale, each))
    elif method in ("task_arithmetic", "breadcrumbs") and normalize:
        put(weights, lambda *each: ({}, _shares(where, each)))
    elif method in WEIGHTED:
        put(weights, lambda *each: ({}, list(each)))
    return found


def _choice(where: str, name: str, own: dict[str, Any], shared: dict[str, Any], default: float) -> Choice:
    """A parameter of one model: its own values, then the shared ones, then mergekit's default."""
    found: Choice = []
    for source in (own, shared):
        if (value := source.get(name)) is None:
            continue
        conditional = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(x, dict) for x in value))
        entries = ([value] if isinstance(value, dict) else value) if conditional else [{"value": value}]
        for entry in entries:
            if not isinstance(entry, dict) or "value" not in entry:
                raise UserError(f"{where}: {name} {value!r}: expected entries with `value:`, and `filter:` in most")
            word, numbers = entry.get("filter"), entry["value"]
            numbers = numbers if isinstance(numbers, list) else [numbers]
            if not numbers or any(isinstance(x, bool) or not isinstance(x, int | float) for x in numbers):
                raise UserError(f"{where}: {name} {entry['value']!r}: expected a number, or numbers along the layers")
            found.append((None if word in (None, "*") else str(word), tuple(map(float, numbers))))
            if found[-1][0] is None:
                return found
    return [*found, (None, (default,))]


def _by_filter(where: str, choices: Sequence[Choice]) -> list[tuple[str | None, list[Values]]]:
    """The values of all choices for the tensors of every filter, in their order, None (all other tensors) last."""
    orders = {tuple(word for word, _ in choice) for choice in choices if len(choice) > 1}
    if len(orders) > 1:
        told = "; ".join(", ".join(map(str, order[:-1])) for order in sorted(orders, key=str))
        raise UserError(f"{where}: weights have filters of different order ({told}); give all of them the same filters")
    return [
        (word, [next(values for own, values in choice if own in (word, None)) for choice in choices])
        for word in next(iter(orders), (None,))
    ]


def _aligned(each: Sequence[Values]) -> list[Values]:
    """The same values at common distances along the layers."""
    steps = math.lcm(*(max(1, len(values) - 1) for values in each))
    if all(len(values) == 1 for values in each):
        return list(each)
    return [tuple(Gradient(values).at(k / steps) for k in range(steps + 1)) for values in each]


def _shares(where: str, each: Sequence[Values]) -> list[Values]:
    """Weights divided by their sum."""
    aligned = _aligned(each)
    totals = [sum(column) for column in zip(*aligned, strict=True)]
    if max(totals) - min(totals) > 1e-9 * abs(totals[0]) or not totals[0]:
        raise UserError(
            f"{where}: normalize: true with weights whose sum changes along the layers, or is 0, is not here"
        )
    return [tuple(x / totals[0] for x in values) for values in aligned]


def _dare(where: str, normalize: bool, scale: Values, each: Sequence[Values]) -> Made:
    """DARE divides by the sum of the weights here, so the scale has it as a factor."""
    if normalize:
        return {"scale": scale}, list(each)
    scale, *weights = _aligned([scale, *each])
    totals = tuple(sum(column) for column in zip(*weights, strict=True))
    if len(set(scale)) > 1 and len(set(totals)) > 1:
        raise UserError(f"{where}: dare_linear with lambda and the sum of the weights both changing along the layers")
    return {"scale": tuple(s * t for s, t in zip(scale, totals, strict=True))}, weights


def _text(values: Values) -> str:
    return BETWEEN.join(map(repr, values))
