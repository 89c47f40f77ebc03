"""A published data set in files: the layouts that people have it in, its split, its names, and who else's results it fits.

A data set is one `Benchmark` in one small file. Its layouts share the readers in `layouts.py`. `load` takes the first layout
that is found under the root or in one of its usual folders, whatever their case, and reads it in place.

Train and test come from, in this order: `--split-file`, the layout (official lists, or `train` and `test` folders), or,
where nothing is published with the data, our own rule (`split.py`).
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastmerge.data import class_names, prompts
from fastmerge.data.archives import archives
from fastmerge.data.dataset import Dataset, Origin
from fastmerge.data.files import data_root
from fastmerge.data.folder import assemble
from fastmerge.data.split import Parts, by_hash, by_list, digest
from fastmerge.data.split_file import read as read_split_file
from fastmerge.data.tree import ClassFolder, looked_for
from fastmerge.errors import UserError
from fastmerge.wording import counted


@dataclass
class Place:
    """What a reader is given: the folder of the data set, and where it puts its notes. test_part: as on the command line."""

    base: str
    domains: tuple[str, ...]
    test_part: str | None = None
    notes: list[str] = field(default_factory=list)
    folders: _Folders = field(default_factory=lambda: _Folders())

    def at(self, need: str) -> str:
        """The file or folder `need` (`a|b`: the first that is there), relative to `base`, with its upper and lower case on
        disk. One that is not there: as it is."""
        options = need.split("|")
        found = next(filter(None, (self.folders.spelt(self.base, one) for one in options)), None)
        return os.path.relpath(found, self.base).replace(os.sep, "/") if found else options[0]


class Images(NamedTuple):
    """What a reader finds. test: None where the layout divides nothing. split: what divides it, in words.

    kind: 'official', 'folders', 'hash' (our own rule) or the form of a split file.
    order: the classes in the order of official labels, if that is not the code-point order.
    """

    train: list[ClassFolder]
    test: list[ClassFolder] | None = None
    kind: str = ""
    split: str = ""
    order: tuple[str, ...] | None = None


class Layout(NamedTuple):
    """One arrangement of files. shape: as in the documentation. places: its usual folders under the root.

    needs: what a folder must contain, `a|b` either of two, `*` as in a shell. tells: what only this data set has, by which
    its tree is recognised; empty if there is nothing of the kind (`train` and `test` are no sign).
    """

    name: str
    shape: str
    places: tuple[str, ...]
    needs: tuple[str, ...]
    read: Callable[[Place], Images]
    tells: str = ""


class Published(NamedTuple):
    """Results that were published on `train` and `test` images. kinds: of split ('official', 'folders', 'hash', a form of
    `split_file`); empty: any, since the counts tell enough."""

    train: int
    test: int
    who: str
    kinds: tuple[str, ...] = ()


class Found(NamedTuple):
    layout: Layout
    base: str


@dataclass(frozen=True)
class Benchmark:
    """name: as in `--dataset`. title: as its authors call it. classes: how many it has. templates: for a text head.

    domains: its domains, or empty. domain_of: the domain of an image by the name of its file. names: class names of the
    folders. otherwise: what to say of counts that nobody published. synsets: wnids that the class folders must be of. flip:
    whether a mirrored image keeps its class.
    """

    name: str
    title: str
    classes: int
    layouts: tuple[Layout, ...]
    templates: str | tuple[str, ...]
    published: tuple[Published, ...]
    otherwise: str
    domains: tuple[str, ...] = ()
    domain_of: Callable[[str], str | None] | None = None
    names: Callable[[Iterable[str]], dict[str, str]] = class_names.from_folders
    synsets: Callable[[], frozenset[str]] | None = None
    flip: bool = True

    def load(
        self,
        root: str | None,
        *,
        split_file: str | None = None,
        test_part: str | None = None,
        skip_bad_images: bool = False,
    ) -> Dataset:
        """The data set under `root`.

        Raises UserError if no layout is found (with the paths tried and the nearest layout), for damaged lists, and for a
        split file that does not fit.
        """
        root = data_root(self.name, root)
        found, others = self.find(root)
        place = Place(found.base, self.domains, test_part if split_file is None else None)
        images, notes = found.layout.read(place), place.notes
        if split_file is not None:
            notes.clear()  # they are about the split of the layout
            images = _listed(self._known(images, notes), split_file, test_part, place)
        else:
            images = _divided(self._known(images, notes), self.domain_of)
        train, test = self._by_domain((images.train, images.test or []), notes)
        if not test:
            raise UserError(
                f"{found.base}: no class has two images, so none is left for testing. Add images, or give --split-file."
            )
        present = {f.name for f in (*train, *test)}
        if others:
            notes.append(
                f"also found, and not used: {', '.join(f'{o.layout.name} in {o.base}' for o in others)}; --data-root with "
                "that folder uses it"
            )
        if self.domains and self.domain_of is None:
            notes += _gaps(train, present, self.domains)
        counts = (sum(len(f.images) for f in train), sum(len(f.images) for f in test))
        return assemble(
            self.name,
            found.base,
            train,
            test,
            skip_bad=skip_bad_images,
            flip=self.flip,
            templates=prompts.templates(self.templates),
            notes=notes,
            class_names=self.names(present),
            order=images.order,
            origin=Origin(
                f"{found.layout.name}, in {found.base}",
                images.split,
                self.comparable(len(present), *counts, images.kind),
            ),
        )

    def find(self, root: str) -> tuple[Found, list[Found]]:
        """The first layout that is in `root` or a usual folder in it; others in other folders, and a better one above it.

        Raises UserError with the paths tried, the nearest layout, and packed files.
        """
        looked: list[str] = []
        near: list[tuple[float, Layout, str, list[str]]] = []
        found: list[Found] = []
        folders = _Folders()
        for layout in self.layouts:
            for place in ("", *layout.places):
                base = folders.resolve(root, place)
                missing = [
                    " or ".join(need.split("|")[:2])
                    for need in layout.needs
                    if base is None or not folders.has(base, need)
                ]
                if base is not None and not missing:
                    if not any(_nested(base, f.base) for f in found):
                        found.append(Found(layout, base))
                elif base is None:
                    looked.append(f"{os.path.join(root, place)} (no such folder)")
                else:
                    looked.append(f"{base} ({layout.name}: no {', '.join(missing)})")
                    if len(missing) < len(layout.needs) or place:
                        near.append((len(missing) / len(layout.needs), layout, base, missing))
        if found:
            better = self._above(root, self.layouts[: self.layouts.index(found[0].layout)])
            return found[0], [*found[1:], *better]
        nearest = ""
        if near:
            _, layout, base, missing = min(near, key=lambda n: n[0])
            nearest = f"\nNearest: {layout.name} in {base}, which lacks {', '.join(missing)}."
        if higher := self._above(root, self.layouts):
            nearest = f"\nIt is in a folder above: --data-root {higher[0].base} ({higher[0].layout.name})."
        packed = archives([root, *(os.path.dirname(n[2]) for n in near), *(n[2] for n in near)])
        raise UserError(
            f"data set {self.name!r} ({self.title}) not found. {looked_for(list(dict.fromkeys(looked)))}{nearest}\n"
            f"{self._layouts()}{packed}"
        )

    def _above(self, root: str, layouts: Sequence[Layout]) -> list[Found]:
        """The first of `layouts` that one of the two folders above `root` has, or nothing."""
        folders, parent = _Folders(), os.path.dirname(os.path.abspath(root))
        for layout in layouts:
            for base in (parent, os.path.dirname(parent)):
                if all(folders.has(base, need) for need in layout.needs):
                    return [Found(layout, base)]
        return []

    def recognised(self, root: str, deep: bool = True) -> str | None:
        """The folder with files that only this data set has, or with its usual name; None if there is none. deep: look in
        the usual folders in `root` too."""
        folders = _Folders()
        for layout in self.layouts:
            for place in ("", *(layout.places if deep else ())):
                base = folders.resolve(root, place)
                if base is None or not all(folders.has(base, need) for need in layout.needs):
                    continue
                usual = {p.rpartition("/")[2].lower() for p in layout.places}
                if (layout.tells and folders.has(base, layout.tells)) or os.path.basename(
                    os.path.abspath(base)
                ).lower() in usual:
                    return base
        return None

    def comparable(self, classes: int, train: int, test: int, kind: str) -> str:
        """Which published results have these images and this split."""
        if classes == self.classes:
            for known in self.published:
                if (known.train, known.test) == (train, test) and kind in (known.kinds or (kind,)):
                    return known.who
        part = f"{classes} of {self.classes} classes; " if classes != self.classes else ""
        return f"no published result that we know ({part}{self.otherwise})"

    def _layouts(self) -> str:
        return "Supported layouts:" + "".join(f"\n  {layout.shape} ({layout.name})" for layout in self.layouts)

    def _known(self, images: Images, notes: list[str]) -> Images:
        """Check the folder names against the data set's own, and give domains their usual names."""
        every = [*images.train, *(images.test or [])]
        if self.synsets is not None and (strange := sorted({f.name for f in every} - self.synsets())):
            notes.append(
                f"{counted(len(strange), 'class folder is', 'class folders are')} not among the {self.classes} classes of "
                f"{self.title}: "
                f"{', '.join(strange[:5])}"
            )
        usual = {f.domain: usual_domain(f.domain, self.domains) for f in every}

        def named(part: list[ClassFolder]) -> list[ClassFolder]:
            return [f._replace(domain=usual[f.domain] or f.domain) for f in part]

        return images._replace(train=named(images.train), test=None if images.test is None else named(images.test))

    def _by_domain(self, parts: Parts, notes: list[str]) -> Parts:
        """`parts` with the images of a folder sorted into domains by their file names, if all images are named so."""
        domain_of = self.domain_of
        if domain_of is None:
            return parts
        for folder in (*parts[0], *parts[1]):
            if other := next((image for image in folder.images if domain_of(image) is None), None):
                notes.append(f"{folder.path}/{other} is not named after a domain, so there are no domains")
                return parts

        def divided(part: list[ClassFolder]) -> list[ClassFolder]:
            found: dict[tuple[str, int], list[str]] = {}
            for i, folder in enumerate(part):
                for image in folder.images:
                    found.setdefault((domain_of(image) or "", i), []).append(image)
            return [part[i]._replace(domain=domain, images=images) for (domain, i), images in sorted(found.items())]

        return divided(parts[0]), divided(parts[1])


def _listed(images: Images, file: str, test_part: str | None, place: Place) -> Images:
    """`images` divided by a split file, whose labels, if it has some, give the order of the classes."""
    listed = read_split_file(file, test_part)
    (train, test), order = by_list(listed, [*images.train, *(images.test or [])], place.base)
    place.notes += listed.notes
    if order and order != images.order and list(order) != sorted(order):
        place.notes.append("the natural order of the classes is that of the labels in the split file")
    return Images(train, test, listed.form, f"{listed.form} of --split-file {file}", order or images.order)


def _divided(images: Images, domain_of: Callable[[str], str | None] | None) -> Images:
    """`images`, divided by our own rule where the layout divides nothing."""
    if images.test is not None:
        return images
    if domain_of is not None and any(domain_of(image) is None for f in images.train for image in f.images):
        domain_of = None  # then there are no domains
    train, test = by_hash(images.train, domain_of)
    split = (
        f"our own, 20 % of every class by a hash of the file names, digest {digest(test)} (none is published with these "
        "files; --split-file takes a list)"
    )
    return Images(train, test, "hash", split, images.order)


def usual_domain(name: str, domains: Sequence[str]) -> str | None:
    """The domain that a folder is: `Real_World` for `Real World`, `clip` for `clipart`; None if it is none of them."""
    plain = re.sub(r"[\W_]", "", name.lower())
    by_plain = {re.sub(r"[\W_]", "", domain.lower()): domain for domain in domains}
    if plain in by_plain:
        return by_plain[plain]
    longer = [domain for key, domain in by_plain.items() if len(plain) > 3 and key.startswith(plain)]
    return longer[0] if len(longer) == 1 else None


def _gaps(train: list[ClassFolder], classes: set[str], domains: tuple[str, ...]) -> list[str]:
    """Notes about domains that are missing or lack a class."""
    have = {domain: {f.name for f in train if f.domain == domain} for domain in dict.fromkeys(f.domain for f in train)}
    notes = (
        [f"only {len(have)} of the {len(domains)} domains: {', '.join(sorted(have))}"]
        if len(have) < len(domains)
        else []
    )
    for domain, own in sorted(have.items()):
        if lack := sorted(classes - own):
            lacking = counted(len(lack), "class", "classes")
            notes.append(f"domain {domain} has no training image of {lacking}: {', '.join(lack[:5])}")
    return notes


def _nested(a: str, b: str) -> bool:
    """Whether one of two folders is the other one or is in it."""
    a, b = os.path.normpath(a), os.path.normpath(b)
    return os.path.commonpath([a, b]) in (a, b)


def folder_in(root: str, place: str) -> str | None:
    """The folder `place` under `root`, whatever its case; None if there is none."""
    return _Folders().resolve(root, place)


class _Folders:
    """Names in folders, whatever their case; each folder is listed once."""

    def __init__(self) -> None:
        self.listed: dict[str, dict[str, str]] = {}

    def names(self, folder: str) -> dict[str, str]:
        if folder not in self.listed:
            try:
                names = sorted(os.listdir(folder), reverse=True)
            except OSError:
                names = []
            self.listed[folder] = {name.lower(): name for name in names}
        return self.listed[folder]

    def resolve(self, root: str, place: str) -> str | None:
        """The folder `place` under `root`, spelt as on disk; None if there is none."""
        found = self.spelt(root, place)
        return found if found and os.path.isdir(found) else None

    def spelt(self, root: str, place: str) -> str | None:
        """The file or folder `place` under `root`, spelt as on disk; None if there is none."""
        for part in filter(None, place.split("/")):
            name = self.names(root).get(part.lower())
            if name is None:
                return None
            root = os.path.join(root, name)
        return root

    def has(self, base: str, need: str) -> bool:
        return any(self._has(base, one) for one in need.lower().split("|"))

    def _has(self, base: str, need: str) -> bool:
        first, _, rest = need.partition("/")
        names = [name for low, name in self.names(base).items() if fnmatch.fnmatchcase(low, first)]
        return any(not rest or self._has(os.path.join(base, name), rest) for name in names)
