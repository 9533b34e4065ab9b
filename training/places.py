"""
Where models and data sets may be, whichever script asks: in folders, or on the Hub. Nothing here imports torch.

A mistyped folder would be looked for on the Hub, for half a minute where there is no network.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from declared_fields import fields_of_configs

MODELS = ("background", "classifier", "model", "model_name_or_path")  # names of arguments
DATASETS = ("complete", "dataset", "in_dataset", "out_dataset")
NAME, HUB_ID = re.compile(r"\w[\w.-]*"), re.compile(r"\w[\w.-]*/\w[\w.-]*")


def check_places(arguments: Mapping[str, object]):
    r"""
    Check that all models and data sets among arguments are folders, or may be on the Hub: OWNER/NAME, where there is no
    folder OWNER here, or a data set's name alone. In a list of models may also be families.

    Args:
        arguments (mapping of `str` to anything): Values by name; those that are no places are not checked.

    Raises:
        ValueError: If one is neither; the message names it, and the folder whose name is nearest.
    """
    for name, value in arguments.items():
        if name == "models" and isinstance(value, list):
            for place in value:
                check_model_or_family(place)
        elif name in (*MODELS, *DATASETS) and isinstance(value, str):
            check_place(name, value)


def check_model_or_family(place: str):
    """[`check_place`] for what may also be the name of a family."""
    families = fields_of_configs()
    if place in families:
        return
    is_word = NAME.fullmatch(place) and not Path(place).exists()
    if is_word and (near := difflib.get_close_matches(place, families, n=1)):
        raise ValueError(f"`models`: there is no folder or family {place}, the nearest is {near[0]}.")
    check_place("models", place)


def check_place(name: str, place: str):
    """[`check_places`] for one of them, and the name of its argument."""
    if name in DATASETS and holds_arrays(Path(place)):
        raise ValueError(
            f"`{name}` must be a data set with a column of images, got arrays: {place}. Save them as pictures in a "
            "folder, or by `datasets.Dataset.from_dict({'image': [PIL.Image.fromarray(x) for x in array]})"
            ".save_to_disk(folder)`."
        )
    if Path(place).is_dir() or "://" in place or beside(Path(place), "old").is_dir():  # which `publish.py` puts back
        return
    if Path(place).is_file():
        what = "data set" if name in DATASETS else "model"
        hint = f"got the file {place}, whose folder is {Path(place).parent}."
        raise ValueError(f"`{name}` must be the folder of a {what} or its id on the Hub, {hint}")
    is_name = name in DATASETS and NAME.fullmatch(place)
    if not is_name and (not HUB_ID.fullmatch(place) or Path(place).parent.is_dir()):
        raise ValueError(f"`{name}`: {no_folder(place)}")


def beside(folder: Path, what: str) -> Path:
    """The hidden folder next to `folder` that holds its `new` content before it takes its place, or the `old` after."""
    return folder.absolute().with_name(f".{folder.absolute().name}-{what}")


def holds_arrays(path: Path) -> bool:
    """Whether a file, or all files in a folder, are arrays of numpy."""
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path] * path.is_file()
    return bool(files) and all(file.suffix in (".npy", ".npz") for file in files)


def no_folder(place: str) -> str:
    """What to say of a folder that does not exist."""
    near = nearest_folder(Path(place).expanduser())
    hint = f", the nearest is {near}" if near else ""
    if HUB_ID.fullmatch(place) and Path(place).parent.is_dir():
        hint += f" (as there is a folder {Path(place).parent} here, it is not looked for on the Hub)"
    return f"there is no folder {place}{hint}."


def nearest_folder(path: Path) -> Path | None:
    """The folder whose path is nearest, part by part; `None` if a part has nothing near."""
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        if not (found / part).is_dir():
            names = [inner.name for inner in found.iterdir() if inner.is_dir()]
            if not (near := difflib.get_close_matches(part, names, n=1)):
                return None
            part = near[0]
        found /= part
    return found
