"""Readers of arrangements that several data sets share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from fastmerge.data import folder, split_file
from fastmerge.data.benchmark import Images, Place, usual_domain
from fastmerge.data.split import by_list
from fastmerge.data.tree import TESTS, WNID, class_folders, descend, folders_with_images, subfolders
from fastmerge.errors import UserError
from fastmerge.wording import counted

PARTS = ("train", "test|val|valid|validation")  # what a folder with parts needs


def either(names: Iterable[str], form: str = "{}") -> str:
    """A need that any of these names meets, each put into `form`."""
    return "|".join(form.format(name) for name in names)


def parts(place: Place) -> Images:
    """`{train,test}/<class>/`, `{train,test}/<domain>/<class>/` or `<domain>/{train,test}/<class>/`."""
    train, test = folder.parts(place.base, place.notes, place.test_part)
    tests = (place.test_part.lower(),) if place.test_part else TESTS
    names = {next(name for name in f.path.split("/") if name.lower() in tests) for f in test}
    return Images(train, test, "folders", f"the train and {' or '.join(sorted(names))} folders")


def flat_wnids(place: Place) -> Images:
    """`<wnid>/`, not divided; other folders are ignored."""
    undivided(place)
    return Images(class_folders(place.base, "", notes=place.notes, named=WNID))


def domains(place: Place) -> Images:
    """`<domain>/<class>/` or `<domain>/images/<class>/` for the known domains, not divided; other folders are ignored."""
    undivided(place)
    return Images(
        [
            f
            for name in subfolders(place.base)
            if usual_domain(name, place.domains)
            for f in class_folders(place.base, descend(place.base, name), name, notes=place.notes)
        ]
    )


def lists(*where: str) -> Callable[[Place], Images]:
    """A reader of lists `<domain>_train.txt` and `<domain>_test.txt` with lines `path label`; the labels give the order.

    where: folders of the lists relative to the data set; the first that has some is used. Lists of a domain whose folder
    is missing are left out.
    """

    def read(place: Place) -> Images:
        on_disk = folders_with_images(place.base)
        present = {usual_domain(f.domain, place.domains) for f in on_disk}
        for source in (os.path.normpath(os.path.join(place.base, place.at(w))) for w in where):
            names = sorted(os.listdir(source)) if os.path.isdir(source) else []
            files = [n for n in names if n.lower().endswith(".txt") and split_file.part_of(n)]
            files = [n for n in files if usual_domain(split_file.before_part(n), place.domains) in present]
            if files:
                split = split_file.read_files((os.path.join(source, n) for n in files), source, place.test_part)
                (train, test), order = by_list(split, on_disk, place.base)
                place.notes += split.notes
                return Images(train, test, "official", f"official, {counted(len(files), 'list')}", order)
        raise UserError(f"{place.base}: none of its lists of images is of a domain whose folder is there.")

    return read


def undivided(place: Place) -> None:
    """Raises UserError for `--test-part` where a layout has no parts."""
    if place.test_part is not None:
        raise UserError(f"--test-part {place.test_part}: the images in {place.base} are not divided. Leave it out.")


def only_test(place: Place, part: str = "test") -> None:
    """Raises UserError if `--test-part` names another part than `part`, the only one for testing that a layout has."""
    if place.test_part not in (None, part):
        raise UserError(
            f"--test-part {place.test_part}: {place.base} is tested on its {part} images only. Leave it out."
        )
