"""German Traffic Sign Recognition Benchmark (Houben et al. 2013, IJCNN) in its official layout, complete or reduced.

Consecutive frames of one physical sign form a track; the track is the data set's natural privacy unit.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fedvit.config import DataConfig
from fedvit.data.folder import check_known, required_path
from fedvit.data.layout import other_source
from fedvit.data.records import Record, TreeSource, check_options, checked
from fedvit.data.trees import (
    FileTree,
    FolderTree,
    JoinedTree,
    ZipTree,
    images_below,
    open_tree,
    prefix_before,
    subfolders,
)
from fedvit.errors import DataError

TRAIN, TEST = "Final_Training/Images/", "Final_Test/Images/"
# The official test archive also holds GT-final_test.test.csv, which has no labels.
TEST_CSV = "GT-final_test.csv"
OFFICIAL_ZIPS = ("GTSRB_Final_Training_Images.zip", "GTSRB_Final_Test_Images.zip", "GTSRB_Final_Test_GT.zip")
_TRACK_FRAME = re.compile(r"(\d+)_\d+$")


def open_gtsrb(config: DataConfig) -> TreeSource:
    """A folder or a zip with ``Final_Training`` and ``Final_Test``, or a folder with the official zips.

    Raises:
        DataError: a part is missing, or a CSV contradicts the files.
    """
    check_options("gtsrb", config.options, [])
    tree = _open_layout(required_path(config))
    prefix = prefix_before(tree.names, TRAIN)
    if prefix is None:
        cure = "Set data.path to a folder or zip in the official GTSRB layout."
        message = f"data.source is 'gtsrb', and {tree} holds no folder {TRAIN}."
        raise DataError(message, cure=other_source(tree, "gtsrb") or cure)
    folder_of = {key: key.removeprefix(TRAIN).split("/", 1)[0] for key in _image_keys(tree, prefix, TRAIN)}
    train_classes = {key: _class_name(folder, tree) for key, folder in folder_of.items()}
    _check_train_csvs(tree, prefix)
    folders = {_class_name(folder, tree) for folder in subfolders(tree, prefix + TRAIN)}
    classes = tuple(sorted({*train_classes.values(), *folders}))
    test_classes = _test_classes(tree, prefix)
    check_known(test_classes.values(), classes, tree)
    train = tuple(Record(key, classes.index(name), _track(key, name)) for key, name in train_classes.items())
    test = tuple(Record(key, classes.index(name)) for key, name in test_classes.items())
    return checked(TreeSource("gtsrb", classes, train, test, tree, (("", prefix),)), tree)


def _open_layout(path: Path) -> FileTree:
    tree = open_tree(path)
    if not isinstance(tree, FolderTree) or prefix_before(tree.names, TRAIN) is not None:
        return tree
    official = [name for name in OFFICIAL_ZIPS if name in tree.names]
    zips = official or sorted(n for n in tree.names if "/" not in n and re.fullmatch(r"GTSRB.*\.zip", n))
    if not official and len(zips) > 1:
        raise DataError(f"{path} holds several GTSRB zips: {', '.join(zips)}.", cure="Set data.path to one of them.")
    return JoinedTree.of([ZipTree.open(path / name) for name in zips]) if zips else tree


def _image_keys(tree: FileTree, prefix: str, parent: str) -> list[str]:
    return [name.removeprefix(prefix) for name in images_below(tree, prefix + parent)]


def _class_name(text: str, place: object) -> str:
    if not (text.isascii() and text.isdigit()):
        raise DataError(f"'{text}' in {place} is no GTSRB class.", cure="Class folders and ClassIds are numbers.")
    return f"{int(text):05d}"


def _track(key: str, class_name: str) -> str | None:
    match = _TRACK_FRAME.match(PurePosixPath(key).stem)
    return f"{class_name}/{match[1]}" if match else None


def _check_train_csvs(tree: FileTree, prefix: str) -> None:
    """The folders give the labels; a CSV must agree with them."""
    csv_path = re.compile(re.escape(prefix + TRAIN) + r"([^/]+)/[^/]+\.csv")
    for match in filter(None, map(csv_path.fullmatch, sorted(tree.names))):
        folder = _class_name(match[1], tree)
        for filename, class_name in _rows(tree, match[0]):
            if class_name != folder:
                raise DataError(
                    f"{match[0]} calls {filename} class {class_name}, but it lies in the folder of class {folder}.",
                    cure="Move the image or mend the line.",
                )


def _test_classes(tree: FileTree, prefix: str) -> dict[str, str]:
    """Class name by key. The CSV of a reduced set may list missing images."""
    keys = _image_keys(tree, prefix, TEST)
    if not keys:
        raise DataError(f"{tree} holds no image in {TEST}.", cure="Add GTSRB_Final_Test_Images.zip or its content.")
    class_of_file = dict(_rows(tree, _find_test_csv(tree)))
    for key in keys:
        if PurePosixPath(key).name not in class_of_file:
            raise DataError(f"{key} has no line in {TEST_CSV}.", cure="Add its line or remove the image.")
    return {key: class_of_file[PurePosixPath(key).name] for key in keys}


def _find_test_csv(tree: FileTree) -> str:
    # The deepest file is next to the images.
    paths = sorted((n for n in tree.names if PurePosixPath(n).name == TEST_CSV), key=lambda n: (-n.count("/"), n))
    if not paths:
        raise DataError(
            f"{tree} holds no {TEST_CSV}, so the test images have no labels.",
            cure="Put GTSRB_Final_Test_GT.zip beside the other zips, or its CSV beside the images.",
        )
    return paths[0]


def _rows(tree: FileTree, name: str) -> Iterator[tuple[str, str]]:
    """(file name, class name) of each line of an annotation CSV."""
    try:
        rows = list(csv.DictReader(io.StringIO(tree.read(name).decode("utf-8-sig")), delimiter=";"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{name} in {tree} is no CSV: {error}.", cure="Fetch it again.") from None
    for line, row in enumerate(rows, start=2):
        filename, class_id = row.get("Filename"), row.get("ClassId")
        if not filename or not class_id:
            raise DataError(
                f"Line {line} of {name} lacks Filename or ClassId.",
                cure="It must be separated by semicolons, with the header Filename;...;ClassId.",
            )
        yield filename, _class_name(class_id.strip(), f"line {line} of {name}")
