"""Models on their way to the Hub and back, with the real clients against a local server."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import LocalHub

pytestmark = [pytest.mark.versions, pytest.mark.slow]

CODE = {"configuration_gated_pixelcnn.py", "modeling_gated_pixelcnn.py", "masking_causal_image.py"}
SETTINGS = {"config.json", "generation_config.json", "preprocessor_config.json"}


@pytest.fixture(scope="module")
def hub():
    return LocalHub()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


def run(command, hub, folder, home, **options):
    environment = hub.environment(folder / home, **options)
    finished = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


def client(what, hub, folder, home="home"):
    finished = run([Path(__file__).with_name("hub_clients.py"), what, folder], hub, folder, home)
    assert not re.search("FutureWarning|DeprecationWarning", finished.stderr)
    return json.loads(finished.stdout.splitlines()[-1]) | {"stderr": finished.stderr}


@pytest.fixture(scope="module")
def pushed(hub, folder):
    return client("push", hub, folder)


@pytest.fixture(scope="module")
def published(hub, folder):
    return client("publish", hub, folder)


@pytest.fixture(scope="module", params=["with", "without"])
def loaded(request, hub, folder, pushed, published):
    """What a fresh process with an empty cache sees, with and without the package."""
    return client(f"load_{request.param}_package", hub, folder, home=request.param) | {"package": request.param}


def test_a_pushed_model_carries_its_code_and_its_processor(hub, pushed):
    files = hub.files("tester/model")
    assert CODE | SETTINGS | {"model.safetensors"} <= set(files)
    assert set(pushed["snapshot"]) >= CODE | {"model.safetensors"}
    assert hub.repos["models", "tester/private"].is_private


def test_a_pushed_pipeline_carries_its_code_and_shards(hub, pushed):
    files = hub.files("tester/pipe")
    assert CODE | {"pipeline_causal_image.py", "model.safetensors.index.json"} <= set(files)
    assert len([name for name in files if name.endswith(".safetensors")]) > 2


def test_a_training_run_pushes_the_averaged_model_and_its_code(hub, pushed):
    files = hub.files("tester/trained")
    assert CODE | {"model.safetensors", "preprocessor_config.json", "README.md"} <= set(files)
    private = ("ema.safetensors", "training_args.bin", "optimizer.pt")
    assert not [name for name in files if name.endswith(private)]


def test_a_pushed_data_set_comes_back(pushed):
    assert pushed["shades"] == [0, 100]


def test_tokens_that_may_not_write_change_nothing(hub, pushed):
    assert "401" in pushed["wrong token"]
    assert "401" in pushed["wrong token, known repo"]
    assert "403" in pushed["reader"]
    assert "403" in pushed["reader, known repo"]
    assert len(hub.titles("tester/model")) == 3  # the first one, model, processor


def test_a_repository_that_is_not_there_or_private_is_named(pushed):
    for case in ("no such repo", "private, without a token"):
        assert re.match("OSError: tester/(none|private) is not a local folder and is not a valid", pushed[case])


def test_a_repository_without_an_image_processor_gets_one_from_its_config_with_a_notice(pushed):
    assert (pushed["bare levels"], pushed["bare images"]) == (4, 2)
    assert "tester/bare has no image processor" in pushed["stderr"]


def test_models_pipelines_and_cards_work_by_repository_id_in_a_fresh_process(loaded):
    for repo_id in ("tester/model", "tester/pipe"):
        assert loaded[f"{repo_id} is right"]
        assert loaded[f"{repo_id} levels"] == 4
    assert loaded["trained is the average"]
    assert loaded["pipeline"] == ["PixelCNNImagePipeline", 3]
    assert loaded["images of the card"] == [[6, 5]] * 4
    assert loaded["module"].startswith("hf_pixelcnn" if loaded["package"] == "with" else "transformers_modules")
    if loaded["package"] == "without":
        assert "trust_remote_code=True" in loaded["not trusted"]


def test_publishing_is_one_commit_and_a_dry_run_none(hub, published):
    assert "RepositoryNotFoundError" in published["after the dry run"]
    assert hub.titles("tester/published") == ["initial commit", "Publish the model", "In shards"]


def test_publishing_again_uploads_what_changed_and_removes_what_vanished(hub, published):
    _, first, sharded = hub.repos["models", "tester/published"].branches["main"]
    assert "model.safetensors" in first.files
    assert "model.safetensors" not in sharded.files
    assert "model.safetensors.index.json" in sharded.files
    assert ".gitattributes" in sharded.files
    for name in ("samples.png", "config.json", "README.md"):
        assert sharded.files[name] is first.files[name]  # not sent again
    assert {"modeling_pixelcnn.py", "pipeline_causal_image.py", "results.json"} <= set(sharded.files)


def test_a_revision_leaves_the_main_branch_alone(hub, published, loaded):
    assert hub.titles("tester/published", "v2")[-2:] == ["In shards", "New score"]
    assert "0.1235" in loaded["card main"]
    assert "0.2" in loaded["card v2"]
    assert "0.1235" not in loaded["card v2"]


def test_publishing_privately_makes_a_private_repository_or_refuses(hub, published):
    assert hub.repos["models", "tester/secret"].is_private
    assert "tester/published exists and is public" in published["private, but known"]


def test_a_repository_of_something_else_is_left_alone(hub, published):
    message = "did not write, which would be replaced or deleted: LICENSE, model.safetensors."
    assert message in published["of somebody else"]
    files = hub.repos["models", "tester/else"].branches["main"][-1].files
    assert {"LICENSE", "model.safetensors"} <= set(files)
    assert "README.md" not in files


def test_the_page_becomes_a_space_with_models_and_package(hub, published):
    titles = [commit.title for commit in hub.repos["spaces", "tester/page"].branches["main"]]
    assert titles == ["initial commit", "Publish the space"]  # what did not change is no commit
    files = hub.files("tester/page", kind="spaces")
    assert {"app.py", "README.md", "hf_pixelcnn/app/page.py"} <= set(files)
    assert files["models/pixelcnn-mnist-binary/model.safetensors"].is_large
    message = "tester/other-page holds files that this script did not write, which would be replaced or deleted: mine"
    assert message in published["a Space of somebody else"]


def test_publishing_without_the_right_to_write_says_so_and_publishes_nothing(hub, published):
    assert "error: publishing needs a token: log in with `hf auth login`" in published["token ''"]
    assert "error: the Hub does not accept the token" in published["token 'hf_wrong'"]
    for case in ("token 'hf_reader'", "reader, known repo"):
        assert "error: the token may not write to tester/published: it needs the role `write`" in published[case]
        assert "\n" not in published[case]
    assert "Not allowed" not in hub.titles("tester/published")


def test_hf_upload_takes_a_saved_folder(hub, folder, published):
    program = Path(sys.executable).with_name("hf")
    environment = hub.environment(folder / "home")
    words = [program, "upload", "tester/by-hand", folder / "run"]
    finished = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=900)
    assert finished.returncode == 0, finished.stderr
    assert set(os.listdir(folder / "run")) - {"hub"} <= set(hub.files("tester/by-hand"))
