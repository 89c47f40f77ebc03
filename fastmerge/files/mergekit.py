"""A config.yml of mergekit 0.1.5 as options of a merge, for the methods that both have.

    mergekit           fastmerge
    linear             average                (normalize: true, its default)
    task_arithmetic    task-arithmetic        scale = lambda; weights
    ties               ties                   scope=tensor zero=positive scale=lambda; weights (normalize: true, its default)
    dare_linear        dare                   p = 1 - density, scale = lambda * sum of the weights; weights
    dare_ties          dare-ties              p = 1 - density, density=1 scope=tensor zero=positive scale=lambda; weights
    model_stock        stock
    slerp              slerp                  weights 1 - t, t

The results agree up to rounding except DARE: mergekit draws its masks from torch's generator, and rescales so that the
L1 norm stays; ours are a function of seed and position, divided by 1 - p (the paper). Where a value is a list of
filters, the first that is part of a tensor's name counts, as in mergekit. Gradients over layers and slices are not read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fastmerge.errors import UserError, nearest
from fastmerge.files.plan import Options

METHODS = {
    "linear": "average",
    "task_arithmetic": "task-arithmetic",
    "ties": "ties",
    "dare_linear": "dare",
    "dare_ties": "dare-ties",
    "model_stock": "stock",
    "slerp": "slerp",
}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# those that say how mergekit computes, not what
FREE = {"int8_mask", "rescale", "tokenizer_source", "tokenizer", "chat_template", "name"}
KNOWN = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype"}


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
    unknown = sorted(config.keys() - KNOWN - FREE)
    if unknown:
        raise UserError(f"--mergekit {path}: {unknown[0]} is not read; expected {', '.join(sorted(KNOWN))}")
    return _options(path, config, method)


def _options(path: Path, config: dict[str, Any], method: str) -> Options:
    shared, base = config.get("parameters") or {}, config.get("base_model")
    models = [one for one in config["models"] if method == "slerp" or one.get("model") != base]
    try:
        names = [str(one["model"]) for one in models]
        given = [{**shared, **(one.get("parameters") or {})} for one in models]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"--mergekit {path}: every entry of models needs `model:`, a path") from None
    rule, linear = METHODS[method], method == "linear"
    normalize = shared.get("normalize", method in ("linear", "ties", "dare_ties"))
    if method in ("ties", "dare_ties", "linear") and not normalize:
        raise UserError(f"--mergekit {path}: {method} with normalize: false is not here; leave it out")
    values = (
        {key for one in given for key in one} - {"normalize", "lambda", "weight", "density", "t", "filter_wise"} - FREE
    )
    if values or shared.get("filter_wise"):
        raise UserError(f"--mergekit {path}: parameter {min(values or {'filter_wise'})} of {method} is not here")
    found = Options(rule, names, base)
    if linear:
        found.base = None
    if config.get("out_dtype") or config.get("dtype"):
        word = config.get("out_dtype") or config["dtype"]
        if word not in DTYPES:
            raise UserError(f"--mergekit {path}: dtype {word!r}: expected one of {', '.join(DTYPES)}")
        found.dtype = DTYPES[word]
    if method == "slerp":
        if base not in names or len(names) != 2:
            raise UserError(f"--mergekit {path}: slerp needs two models, one of them the base_model")
        found.models, found.base = [base, next(name for name in names if name != base)], None
    filters = _filters(path, given)
    for pattern in filters:
        settings, weights = _values(path, method, pattern, given, bool(normalize))
        if pattern is None:
            found.settings, found.weights = settings, weights
        else:
            words = [f"{name}={value}" for name, value in settings.items()]
            words += ["weights=" + "/".join(map(repr, weights))] if weights is not None else []
            found.tensors.insert(0, f".*{re.escape(pattern)}.*:{','.join(words)}")  # here the last match counts
    return found


def _filters(path: Path, given: list[dict[str, Any]]) -> list[str | None]:
    """The filters of all values in the order of the file, None (all other tensors) last."""
    found: dict[str, None] = {}
    for one in given:
        for value in one.values():
            for entry in value if isinstance(value, list) else []:
                if not isinstance(entry, dict):
                    raise UserError(
                        f"--mergekit {path}: {value} is a gradient over layers; give weights with --tensors instead"
                    )
                if entry.get("filter") not in (None, "*"):
                    found[str(entry["filter"])] = None
    return [*found, None]


def _values(
    path: Path, method: str, pattern: str | None, given: list[dict[str, Any]], normalize: bool
) -> tuple[dict[str, Any], list[float] | None]:
    """(settings, weights) for the tensors of a filter."""

    def number(one: dict[str, Any], name: str, default: float) -> float:
        value = one.get(name, default)
        if isinstance(value, list):
            fitting = [e["value"] for e in value if e.get("filter") in (None, "*") or e["filter"] == pattern]
            if not fitting:
                raise UserError(f"--mergekit {path}: {name} has no value for the tensors that no filter names")
            value = fitting[0]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"--mergekit {path}: {name} {value!r}: expected a number")
        return float(value)

    def one_for_all(name: str, default: float) -> float:
        found = {number(one, name, default) for one in given}
        if len(found) > 1:
            raise UserError(f"--mergekit {path}: {name} differs between the models, and {METHODS[method]} takes one")
        return found.pop()

    if method == "model_stock":
        return {}, None
    if method == "slerp":
        t = one_for_all("t", 0.5)
        return {}, [1 - t, t]
    weights = [number(one, "weight", 1.0) for one in given]
    if method == "linear":
        return {}, weights
    scale, density = one_for_all("lambda", 1.0), one_for_all("density", 1.0)
    if method in ("task_arithmetic", "dare_linear") and normalize:
        weights = [w / sum(weights) for w in weights]
    if method == "task_arithmetic":
        return {"scale": scale}, weights
    if method == "dare_linear":
        return {"p": 1 - density, "scale": scale * sum(weights)}, weights
    ties = {"scope": "tensor", "zero": "positive", "scale": scale}
    return ({"density": density} if method == "ties" else {"p": 1 - density, "density": 1.0}) | ties, weights
