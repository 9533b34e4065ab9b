"""
Where models and data sets may be, whichever script asks: in folders, or on the Hub. Nothing here imports torch.

A mistyped folder would be looked for on the Hub, for half a minute where there is no network.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from declared_fields import fields_of_configs

MODELS = ("background", "classifier", "model", "model_name_or_path", "models")  # names of arguments
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
        places = value if isinstance(value, list) else [value]
        for place in places if name in (*MODELS, *DATASETS) else []:
            if isinstance(place, str) and not (name == "models" and place in fields_of_configs()):
                check_place(name, place)


def check_place(name: str, place: str):
    """[`check_places`] for one of them, and the name of its argument."""
    if Path(place).is_dir() or "://" in place or beside(Path(place), "old").is_dir():  # which `publish.py` puts back
        return
    if Path(place).is_file():
        what = "model" if name in MODELS else "data set"
        raise ValueError(
            f"`{name}` must be the folder of a {what} or its id on the Hub, got the file {place}.{how(place)}"
        )
    is_name = name in DATASETS and NAME.fullmatch(place)
    if not is_name and (not HUB_ID.fullmatch(place) or Path(place).parent.is_dir()):
        raise ValueError(f"`{name}`: {no_folder(place)}")


def beside(folder: Path, what: str) -> Path:
    """The hidden folder next to `folder` that holds its `new` content before it takes its place, or the `old` after."""
    return folder.absolute().with_name(f".{folder.absolute().name}-{what}")


def how(file: str) -> str:
    """How the content of a file that is no folder can be used."""
    if Path(file).suffix not in (".npy", ".npz"):
        return f" Its folder is {Path(file).parent}."
    return (
        " Save its arrays as pictures in a folder, or by `datasets.Dataset.from_dict({'image': [PIL.Image.fromarray(x) "
        "for x in array]}).save_to_disk(folder)`."
    )


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
