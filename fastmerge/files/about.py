"""What a merged model of runs is: the description that `fastmerge evaluate` needs, where all inputs agree on it."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from fastmerge.files.headers import read_header
from fastmerge.files.inputs import Input


def recipe_of(one: Input) -> dict[str, Any] | None:
    """The recipe of a model of a run, or None."""
    if "about" not in one.metadata:
        return None
    from fastmerge.models.saved import KEYS  # takes a second, so not for other files

    try:
        about = json.loads(one.metadata["about"])
    except ValueError:
        return None
    return about if isinstance(about, dict) and about.keys() >= KEYS else None


def kind_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """What has to be equal for the merged tensors to be a model."""
    kind = {
        name: recipe[key] for name, key in (("heads", "head"), ("features", "features"), ("classes", "class_names"))
    }
    return kind | {"inputs": recipe["input"], "backbones": recipe["config"]["model"]["model"]}


def difference(inputs: Sequence[Input], recipes: Sequence[dict[str, Any]]) -> str | None:
    """What keeps models of runs from being one model, in words."""
    first = kind_of(recipes[0])
    for one, recipe in zip(inputs, recipes, strict=True):
        kind = kind_of(recipe)
        if differ := [name for name, value in kind.items() if value != first[name]]:
            both = _short(kind[differ[0]]), _short(first[differ[0]])
            return (
                f"{one.label} and {inputs[0].label} have different {differ[0]}, so the merged model has none "
                f"({both[0]}; {both[1]})"
            )
    return None


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def merged_about(
    models: Sequence[Input], rule: str, names: Collection[str], single: bool
) -> tuple[dict[str, Any] | None, str | None]:
    """(the description of a merged model, or None; why there is none, if one of the models is of a run).

    names: of the tensors in the output. single: it is one file. The classes are those that any of the models has learned;
    tasks and settings are of the model that has learned most.
    """
    found = [recipe_of(one) for one in models]
    recipes = [recipe for recipe in found if recipe is not None]
    if not recipes:
        return None, None
    if len(recipes) < len(models):
        return None, f"{models[found.index(None)].label} is no model of a run"
    if why := difference(models, recipes):
        return None, why
    if not single:
        return None, "it has several files; leave --shard away"
    if missing := sorted(read_header(next(iter(models[0].files)))[0].keys() - set(names)):
        return None, f"it has no {missing[0]}, which {models[0].label} has"
    candidates = sorted({c for recipe in recipes for c in recipe["candidates"]})
    about = max(recipes, key=lambda recipe: len(recipe["candidates"]))
    about = {key: value for key, value in about.items() if key not in ("final_accuracy", "kept")}
    return about | {"candidates": candidates, "method": f"merge {rule}"}, None
