"""What determines the numbers of a run. Everything else may change between two starts of it.

Settings are compared by value. What a setting names (images, class order, weights) is compared by content, so a file may
move but not change. `config.FREE` lists the settings that do not affect the numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.config import FREE, PLAIN_GROUPS, declarations, to_dict
from fastmerge.data.scenario import uneven_sizes
from fastmerge.methods import METHODS
from fastmerge.plan import Run, training_changes

if TYPE_CHECKING:
    from fastmerge.setup import Setup

CONTINUES = "continues with"
SHOWN = 12  # digits of a hash in messages; the manifest has all


def determinants(setup: Setup, runs: Sequence[Run], manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What determines the numbers, JSON-able: `settings` and `contents` of all runs, and `runs`, the settings of each.

    manifest: of the scenario. A run depends on the groups of settings that its method reads, not on those of others, and on
    the settings of training that it has in place of the command's.
    """
    backbone, dataset = setup.backbone, setup.dataset
    values = to_dict(setup.config)
    settings = {f"{group}.{name}": value for group in PLAIN_GROUPS for name, value in values[group].items()}
    settings |= {  # resolved values, so that a flag that repeats the default changes nothing
        "data.dataset": values["data"]["dataset"][0]
        if len(values["data"]["dataset"]) == 1
        else values["data"]["dataset"],
        "scenario.tasks": len(setup.scenario.tasks),
        "scenario.first_classes": None,  # part of the sizes
        "scenario.task_sizes": uneven_sizes(setup.scenario),
        "data.flip": setup.flip,
        "model.head": setup.head.kind,
    }
    contents = {
        "device": setup.device.type,
        "list of images": manifest["sha256"],
        "images": manifest["images_sha256"],
        "order": manifest["order_sha256"],
        "class names": _hash([dataset.class_names, dataset.templates]),
        "starting weights": "drawn from the seed" if setup.random_weights else backbone.weights_sha256,
        "text tower": setup.text_sha256,
        "data of --retain": _hash(setup.retained.contents()) if setup.retained else None,
        "normalisation": f"mean {list(backbone.mean)}, std {list(backbone.std)}, {backbone.image_size} px",
    }
    own = {}
    for run in runs:
        groups = to_dict(run.config)
        name = run.folder
        own[name] = {
            f"{group}.{setting}": value
            for group in METHODS[run.method].groups_read(run.config)
            for setting, value in groups[group].items()
        }
        own[name] |= METHODS[run.method].contents(run.config)
        changes = training_changes(run.config, setup.config)
        own[name] |= {f"training.{setting}": value for setting, value in changes.items()}
        if setup.earlier is not None and (setup.earlier.path / name).exists():
            own[name][CONTINUES] = setup.earlier.digest(name)
    settings = {name: value for name, value in settings.items() if name not in FREE}
    return json.loads(json.dumps({"settings": settings, "contents": contents, "runs": own}))


def differences(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> list[str]:
    """A line 'what: old -> new' for everything in `new` that differs from `old`. Skips runs that are only in one of them.

    A setting that `old` lacks was added later, so that run had its default.
    """
    lines = []
    for part in ("settings", "contents"):
        lines += _changes(old[part], new[part])
    for run in old["runs"].keys() & new["runs"].keys():
        lines += sorted(f"{run}: {line}" for line in _changes(old["runs"][run], new["runs"][run]))
    return lines


def fingerprint(determined: dict[str, dict[str, Any]], run: str) -> str:
    """sha256 of all that determines one run; `run` is the name of its folder."""
    return _hash([determined["settings"], determined["contents"], run, determined["runs"][run]])


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changed = [name for name in new if old.get(name, _default(name)) != new[name]]
    return [f"{name}: {_shown(old.get(name, _default(name)))} -> {_shown(new[name])}" for name in changed]


def _default(name: str) -> Any:
    group, _, setting = name.partition(".")
    known = declarations().get(group, {}).get(setting)
    return json.loads(json.dumps(known[1])) if known else None


def _shown(value: Any) -> str:
    is_hash = isinstance(value, str) and len(value) == 64
    return f"sha256 {value[:SHOWN]}" if is_hash else value if isinstance(value, str) and " " in value else repr(value)


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
