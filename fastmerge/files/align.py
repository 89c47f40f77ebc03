"""Names of one model as another calls it: `module.`, `model.`, `visual.` and their like in front of every name."""

from __future__ import annotations

import dataclasses

from fastmerge.files.inputs import Input

PREFIXES = ("", "module.", "model.", "_orig_mod.", "backbone.", "visual.", "model.visual.", "vision_model.")


def align(model: Input, reference: Input) -> Input:
    """`model` with the prefix of its names changed so that most of them are names of `reference`; the change is a note.

    Names stay as they are unless that finds more of them.
    """
    best, names = sum(name in reference.entries for name in model.entries), {}
    for old in PREFIXES:
        for new in PREFIXES:
            renamed = {name: new + name[len(old) :] for name in model.entries if name.startswith(old)}
            mapping = {name: renamed.get(name, name) for name in model.entries}
            found = sum(name in reference.entries for name in mapping.values())
            if old != new and found > best and len(set(mapping.values())) == len(mapping):
                best, names, change = found, mapping, (old, new)
    if not names:
        return model
    old, new = change
    said = f"{old or 'no prefix'} -> {new or 'no prefix'}"
    return dataclasses.replace(
        model,
        entries={names[name]: dataclasses.replace(e, name=names[name]) for name, e in model.entries.items()},
        shards={names.get(name, name): file for name, file in model.shards.items()},
        notes=[*model.notes, f"{model.label}: names matched with {said} ({best} of {len(names)})"],
    )
