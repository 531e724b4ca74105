"""Can these files train a classifier? Looked at before a new search decodes any: what a stranger's folder gets wrong is
refused in one sentence, what is doubtful is said. Runs that exist are not judged again.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from actors.threads import in_threads
from orchestrator.data.imagefiles import SUFFIXES, files_by_class, is_image, labels_of
from searchspaces.errors import DataError

LEAST_PER_CLASS = 10        # below, the splits hold too few images of a class to choose or judge by
FEW_PER_CLASS = 50          # below, it works, and accuracies are rough
MANY_SKIPPED = 0.02         # of all files; fewer are a Thumbs.db or a note
NAMED = 3                   # of files that cannot be read
TRAIN, TEST, VALIDATION = ("train", "training"), ("test", "testing"), ("val", "valid", "validation")
SPLIT_NAMES = (*TRAIN, *TEST, *VALIDATION)


@dataclass(frozen=True)
class Files:
    """Of one folder: images of every class by the class' name, images of no class, and endings of other files."""

    classes: Mapping[str, Sequence[Path]]
    stray: int
    others: Counter[str]


def check_files(kind: str, train: Path, test: Path | None, names: Sequence[str] | None = None) -> list[str]:
    """Sentences that a user should hear. DataError where no classifier can be trained on `train`, a Parquet file or a
    folder; what is not there at all is left to the reader. `names` of a Parquet file's classes, where they are given.
    """
    if not train.exists() or train.is_dir() != (kind == "folder"):
        return []
    if kind != "folder":
        labels, known = labels_of(train, folder=False)
        named = names or known
        if len(named) < 2:
            raise DataError(f"{train} holds one class only ('{named[0]}'); a classifier needs at least two")
        counts = np.bincount(labels, minlength=len(named))
        return _check_counts(train, {named[i] if i < len(named) else str(i): int(n) for i, n in enumerate(counts)})
    _refuse_splits(train)
    found = _look(train)
    if not any(found.classes.values()):
        raise DataError(_no_classes(train, found))
    if len(found.classes) == 1:
        raise DataError(_one_class(train, next(iter(found.classes))))
    notes = _check_counts(train, {name: len(images) for name, images in found.classes.items()})
    notes += _skipped(train, found)
    images = [image for of_class in found.classes.values() for image in of_class]
    if test is not None and test.is_dir():
        images += [image for of_class in _look(test).classes.values() for image in of_class]
    _refuse_unreadable(images)
    return notes


def _look(folder: Path) -> Files:
    """As the reader finds them."""
    files = files_by_class(folder)
    others = Counter(file.suffix.lower() for of_class in files.values() for file in of_class if not is_image(file))
    stray = sum(is_image(entry) and entry.is_file() and not entry.name.startswith(".") for entry in folder.iterdir())
    return Files({name: [file for file in of_class if is_image(file)] for name, of_class in files.items()}, stray,
                 others)


def _refuse_splits(folder: Path) -> None:
    """A folder of `train` and `test` folders is one level too high."""
    found = {entry.name.lower(): entry for entry in folder.iterdir()
             if entry.is_dir() and not entry.name.startswith(".")}
    if not found or not set(found) <= set(SPLIT_NAMES) or not set(found) & set(TRAIN):
        return
    train = next(found[name] for name in TRAIN if name in found)
    test = next((found[name] for name in (*TEST, *VALIDATION) if name in found), None)
    settings = f"data.train={train}" + (f" and data.test={test}" if test is not None else "")
    raise DataError(f"{folder} holds {' and '.join(sorted(path.name for path in found.values()))}, which are no "
                    f"classes but parts of the data; set {settings}, each with a sub-folder of images per class")


def _no_classes(folder: Path, found: Files) -> str:
    if found.stray:
        return (f"{folder} holds images ({found.stray}) and no sub-folder of them, so nothing says of which class an "
                f"image is; put those of each class into a sub-folder with its name, as {folder}/cat/1.jpg")
    skipped = f"; it holds {_endings(found.others)}" if found.others else ""
    return f"{folder} holds no images; put them into one sub-folder per class ({', '.join(SUFFIXES)}){skipped}"


def _one_class(folder: Path, name: str) -> str:
    below = [entry.name for entry in (folder / name).iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    hint = (f"if the classes are the {len(below)} folders in it, set data.train={folder / name}" if len(below) > 1
            else "add a sub-folder with images of another class, or of anything else")
    return f"{folder} holds one class only ('{name}'); a classifier needs at least two: {hint}"


def _check_counts(train: Path, counts: Mapping[str, int]) -> list[str]:
    by_count = sorted(counts.items(), key=lambda pair: pair[1])
    few = [(name, count) for name, count in by_count if count < LEAST_PER_CLASS]
    if few:
        more = f" ({len(few)} classes have too few)" if len(few) > 1 else ""
        raise DataError(f"class '{few[0][0]}' has {few[0][1]} images in {train}; at least {LEAST_PER_CLASS} of every "
                        f"class are needed to train, to choose and to judge, {FEW_PER_CLASS} are better; add some, or "
                        f"remove the class{more}")
    small = [(name, count) for name, count in by_count if count < FEW_PER_CLASS]
    if not small:
        return []
    which = f"class '{small[0][0]}' has {small[0][1]} images" if len(small) == 1 else (
        f"{len(small)} of {len(counts)} classes have fewer than {FEW_PER_CLASS} images, '{small[0][0]}' has "
        f"{small[0][1]}")
    return [f"{which} in {train}: with fewer than {FEW_PER_CLASS} of a class accuracies are rough; add some if you can"]


def _skipped(folder: Path, found: Files) -> list[str]:
    notes = []
    if found.stray:
        notes.append(f"images in {folder} itself, in no class, are left out ({found.stray})")
    others, images = sum(found.others.values()), sum(map(len, found.classes.values()))
    if others > MANY_SKIPPED * (others + images):
        notes.append(f"files in {folder} that are no images are left out ({_endings(found.others)}); images end "
                     f"with {', '.join(SUFFIXES)}")
    return notes


def _endings(others: Counter[str]) -> str:
    shown = [f"{count} {ending or 'without an ending'}" for ending, count in others.most_common(NAMED)]
    rest = sum(others.values()) - sum(count for _, count in others.most_common(NAMED))
    return ", ".join(shown + [f"{rest} others"] * (rest > 0))


def _refuse_unreadable(images: Sequence[Path]) -> None:
    """By their first bytes; a file that ends early is found when it is decoded."""
    broken = [image for image, opens in zip(images, in_threads(_opens, images), strict=True) if not opens]
    if broken:
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise DataError(f"{len(broken)} of {len(images)} image files cannot be read: "
                        f"{', '.join(map(str, broken[:NAMED]))}{more}; repair or remove them")


def _opens(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except Exception:   # Pillow's formats raise whatever they stumble over
        return False
