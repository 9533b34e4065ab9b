"""What is shipped, what is public, and which module may import which."""

import ast
import email
import importlib
import inspect
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from graphlib import TopologicalSorter

import pytest
from conftest import FAMILIES, ROOT

import hf_pixelcnn
import hf_pixelcnn.training

PACKAGE = ROOT / "hf_pixelcnn"
PROJECT_URL = "https://example.com/someone/hf_pixelcnn"
# Imports run from the later of these to the earlier, or stay inside one.
LAYERS = (
    (
        "version",
        "compressed_stream",
        "configuration",
        "masking",
        "likelihood",
        "pictures",
        "checks",
        "generation_config",
    ),
    ("recurrence",),
    ("adapters", "weights"),
    ("caching", "canvas", "sampling", "generation"),
    ("modeling", "blocks", "classification"),
    ("image_processing", "pipeline", "preview", "receptive_field", "compression"),
    ("__init__",),
)


def modules_of(folder):
    return {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in folder.glob("*.py")}


def imported(tree):
    """Modules of its own folder that a module imports while it is loaded or later, `TYPE_CHECKING` apart."""
    for_types = [
        statement
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in ast.walk(node)
    ]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node not in for_types:
            found |= {node.module} if node.module else {name.name for name in node.names}
    return found


def test_no_module_imports_itself_by_way_of_others():
    for folder in (PACKAGE, PACKAGE / "app", PACKAGE / "training"):
        TopologicalSorter({name: imported(tree) for name, tree in modules_of(folder).items()}).prepare()


def layer_of(module):
    *_, longest = sorted((name for names in LAYERS for name in names if module.startswith(name)), key=len)
    return next(i for i, names in enumerate(LAYERS) if longest in names)


def test_imports_run_one_way():
    for name, tree in modules_of(PACKAGE).items():
        assert all(layer_of(other) <= layer_of(name) for other in imported(tree)), name


def test_shared_modules_know_no_family_and_the_package_knows_nothing_of_training():
    of_a_family = re.compile(rf"(configuration|modeling|caching|recurrence)_({'|'.join(FAMILIES)})")
    for name, tree in modules_of(PACKAGE).items():
        assert not imported(tree) & {"app", "training"}, name
        if name != "__init__" and not of_a_family.fullmatch(name):
            assert not [other for other in imported(tree) if of_a_family.fullmatch(other)], name
    for name in ("compressed_stream", "version"):  # can be audited alone
        assert not imported(modules_of(PACKAGE)[name]), name


@pytest.mark.parametrize("module", [hf_pixelcnn, hf_pixelcnn.training], ids=lambda module: module.__name__)
def test_all_public_names_exist_are_listed_once_and_say_what_they_are(module):
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        thing = getattr(module, name)
        assert not callable(thing) or inspect.getdoc(thing), name
    imported_names = {
        name.asname or name.name
        for node in ast.walk(ast.parse((PACKAGE / module.__name__[11:].lstrip(".") / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        for name in node.names
    }
    assert imported_names - {"*"} <= set(module.__all__)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs datasets: pip install 'hf_pixelcnn\[train\]'"):
        importlib.reload(hf_pixelcnn.training)
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "hf_pixelcnn.app.page", raising=False)
    with pytest.raises(ImportError, match=r"needs gradio: pip install 'hf_pixelcnn\[app\]'"):
        importlib.import_module("hf_pixelcnn.app.page")


def test_the_readme_names_every_family():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for record in FAMILIES.values():
        assert f"`{record.causal_class.__name__}`" in readme


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The wheel and the sdist, built from the files that git knows."""
    folder = tmp_path_factory.mktemp("build")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    source = folder / "source"
    for name in files:
        if name.startswith("hf_pixelcnn/") or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as b; b.build_sdist('..'); b.build_wheel('..')"
    environment = {**os.environ, "PROJECT_URL": PROJECT_URL}
    subprocess.run([sys.executable, "-c", build], cwd=source, env=environment, capture_output=True, check=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_package_and_nothing_else(archives):
    wheel, sdist = archives
    known = subprocess.run(["git", "ls-files", "hf_pixelcnn"], cwd=ROOT, capture_output=True, text=True, check=True)
    package = set(known.stdout.split())
    with zipfile.ZipFile(wheel) as file:
        assert {name for name in file.namelist() if ".dist-info/" not in name} == package
    with tarfile.open(sdist) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    assert package <= names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "training", "model_cards")]


@pytest.mark.slow
def test_the_page_of_a_package_index_has_no_dead_links(archives):
    with zipfile.ZipFile(archives[0]) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(file.read(name))
    page = str(metadata.get_payload())
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Project-URL"] == f"Source, {PROJECT_URL}"
    sections = {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in page.split("\n")}
    targets = re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', page)
    assert len(targets) > 30
    for link, picture in targets:
        base = f"{PROJECT_URL}/{'raw' if picture else 'blob'}/v{hf_pixelcnn.__version__}/"
        target = link or picture
        if target.startswith("#"):
            assert target[1:] in sections
        elif target.startswith(PROJECT_URL) or not target.startswith("https://"):
            assert target.startswith(base), target
            assert (ROOT / target.removeprefix(base)).exists(), target


@pytest.mark.slow
def test_the_installed_wheel_works_from_another_folder(archives, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "site", archives[0]],
        capture_output=True,
        check=True,
    )
    code = (
        "import pathlib, sys, torch, transformers, hf_pixelcnn\n"
        "assert 'peft' not in sys.modules\n"
        "import hf_pixelcnn.training\n"
        "assert 'matplotlib' not in sys.modules  # before it is needed\n"
        f"model = transformers.AutoModel.from_pretrained({str(ROOT / 'model_cards' / 'pixelcnn-mnist-binary')!r})\n"
        "images = model.generate(image_size=(4, 5))\n"
        "assert images.shape == (1, 1, 4, 5)\n"
        "model.save_pretrained('saved')\n"
        "again = transformers.AutoModel.from_pretrained('saved')\n"
        "assert torch.equal(again.log_prob(images), model.log_prob(images))\n"
        "for module in (hf_pixelcnn, hf_pixelcnn.training):\n"
        "    print(pathlib.Path(module.__file__).resolve())\n"
    )
    (tmp_path / "elsewhere").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert all(line.startswith(str((tmp_path / "site").resolve())) for line in child.stdout.split())
