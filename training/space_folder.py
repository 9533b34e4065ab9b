r"""
The folder of a Space: what starts the page, the package that it imports, and the published models.
`publish.py --space true` pushes it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from published_folder import PROJECT, files_in

from hf_pixelcnn.training import InputError

SPACE = PROJECT / "model_cards" / "space"
PAGE = {path.name: path for path in (PROJECT / "training" / "app.py", SPACE / "README.md", SPACE / "requirements.txt")}
MODEL = ("config.json", "generation_config.json", "preprocessor_config.json", "results.json", "recipe.yaml")
MARK = "`training/publish.py --space`"  # which the card of every Space says
CHECK = """
import pathlib, sys
here = pathlib.Path.cwd()
sys.path.insert(0, str(here))
import hf_pixelcnn
from hf_pixelcnn.app import actions
assert pathlib.Path(hf_pixelcnn.__file__).is_relative_to(here), hf_pixelcnn.__file__
for folder in sorted(here.glob("models/*")):
    *_, drawn = actions.draw(actions.load_shown_model(folder), actions.ANY, 1, seed=0)
    assert drawn.animation, folder
"""


def write_space(folder: Path):
    """Write everything that goes to the Space into an empty folder."""
    for name, path in PAGE.items():
        shutil.copyfile(path, folder / name)
    package = PROJECT / "hf_pixelcnn"
    for source in (package, package / "app"):
        target = folder / source.relative_to(PROJECT)
        target.mkdir()
        for path in source.iterdir():
            if path.is_file() and path.suffix != ".pyc":
                shutil.copyfile(path, target / path.name)
    models = sorted(path.parent for path in PROJECT.glob("model_cards/*/config.json"))
    if not models:
        raise InputError("there is no model in model_cards to show.")
    for model in models:
        target = folder / "models" / model.name
        target.mkdir(parents=True)
        for path in [*(model / name for name in MODEL), *model.glob("model*.safetensors*")]:
            if path.exists():
                shutil.copyfile(path, target / path.name)


def check_space(folder: Path):
    r"""
    Load every model and draw an image in a fresh process, with the package of the folder.

    Raises:
        InputError: If that fails.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    finished = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise InputError(f"the Space written does not work: {reason}")


def not_of_a_space(names: Iterable[str], card: str) -> list[str]:
    """Which of these files, paths inside a folder or repository with this card, `write_space` did not write."""
    folders = ("hf_pixelcnn/", "models/")
    return sorted(name for name in names if MARK not in card or not (name in PAGE or name.startswith(folders)))


def foreign_in_space(folder: Path) -> list[str]:
    """What in a folder is not of the folder of a Space that `publish.py` wrote."""
    files = files_in(folder)
    return not_of_a_space(files, files["README.md"].read_text("utf-8") if "README.md" in files else "")
