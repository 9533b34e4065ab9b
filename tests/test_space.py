"""The folder of a Space: complete, works with nothing else of the project, and goes to the Hub as a Space."""

import re
import shutil

import publish
import pytest
import space_folder
from conftest import ROOT, one_line_error

pytestmark = pytest.mark.slow


def test_the_folder_of_a_space_works_by_itself_and_replaces_only_its_own_files(tmp_path, monkeypatch):
    target = tmp_path / "space"
    words = ["--space", "true", "--output_dir", str(target)]
    publish.main(words)  # loads every model with the package of the folder, and draws
    names = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert {"app.py", "README.md", "requirements.txt", "hf_pixelcnn/app/page.py"} <= names
    models = {path.parent.name for path in ROOT.glob("model_cards/*/config.json")}
    assert {path.parent.name for path in target.glob("models/*/model.safetensors")} == models
    monkeypatch.setattr(publish, "check_space", lambda folder: None)
    publish.main(words)
    (target / "mine.txt").write_text("keep me")
    assert "mine.txt" in one_line_error(publish.main, words)
    assert (target / "mine.txt").exists()
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "notes").write_text("keep me")
    for other in ("notes", "link"):
        assert "is a file or a link" in one_line_error(publish.main, [*words[:3], tmp_path / other])
    assert (tmp_path / "notes").read_text() == "keep me"
    assert "--model, or --space" in one_line_error(publish.main, [])
    assert "--model, or --space" in one_line_error(publish.main, [*words, "--model", tmp_path])
    shutil.rmtree(target)
    monkeypatch.undo()
    monkeypatch.setattr(space_folder, "MODEL", ())  # models without their configurations
    assert "the Space written does not work" in one_line_error(publish.main, words)
    assert not target.exists()


def test_the_space_asks_for_the_versions_that_the_page_was_tested_with():
    pins = {}
    for name in ("constraints.txt", "constraints-app.txt"):
        pins |= dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))
    space = ROOT / "model_cards" / "space"
    asked = dict(re.findall(r"^([\w-]+)==(\S+)", (space / "requirements.txt").read_text(), re.MULTILINE))
    assert asked == {name: pins[name] for name in asked}
    assert {"torch", "transformers", "constriction", "pillow"} <= set(asked)
    card = (space / "README.md").read_text(encoding="utf-8")
    assert f"sdk_version: {pins['gradio']}\n" in card
    assert space_folder.MARK in card
