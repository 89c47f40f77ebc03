"""Prompt templates of a text head: one `{}` stands for the class name.

openai80 and simple7 are open_clip's copies of the templates that OpenAI published for ImageNet.
"""

from __future__ import annotations

import json
import os

from fastmerge.errors import UserError, nearest

PHOTO = ("a photo of a {}.",)  # CLIP's own default
GOOD_PHOTO = ("a good photo of a {}.",)
CARS = tuple(  # the templates of OpenAI's CLIP for Stanford Cars, in the data sheet of its repository
    [f"a photo of {word} {{}}." for word in ("a", "the", "my")]
    + ["i love my {}!"]
    + [f"a photo of my {word} {{}}." for word in ("dirty", "clean", "new", "old")]
)
CONTINUAL_CLIP = (GOOD_PHOTO, ("a bad photo of a {}.",))  # in the released configurations, by data set
SETS = ("openai80", "simple7")


def templates(spec: str | tuple[str, ...]) -> tuple[str, ...]:
    """The templates that `spec` names: openai80, simple7, a template, a file with one template per line (or a JSON list).

    A tuple is returned as it is. Raises UserError for a template without exactly one `{}`, or a file without any.
    """
    if isinstance(spec, tuple):
        return spec
    if spec in SETS:
        import open_clip  # takes seconds

        source = {"openai80": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple7": open_clip.SIMPLE_IMAGENET_TEMPLATES}[spec]
        return tuple(template("{}") for template in source)
    path = os.path.expanduser(spec)
    if not os.path.isfile(path):
        if spec.count("{}") != 1:
            raise UserError(
                f"--template {spec}: expected a text with one {{}} for the class name, such as 'a photo of a {{}}.', an "
                f"existing file of such lines, openai80 or simple7.{nearest(spec, SETS)}"
            )
        return (spec,)
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        found = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--template {spec}: cannot read it ({error}). Expected one template per line.") from None
    lines = [line.strip().rstrip(",").strip("'\"") if isinstance(line, str) else str(line) for line in found]
    lines = [line for line in lines if line]
    for number, line in enumerate(lines, 1):
        if line.count("{}") != 1:
            raise UserError(
                f"--template {spec}: template {number}, {line!r}, needs exactly one {{}} for the class name."
            )
    if not lines:
        raise UserError(f"--template {spec}: the file has no template. Expected one per line.")
    return tuple(lines)
