"""training/compress.py: image files to one stream and back, and every mistake answered in one line."""

import json
import re
import zlib
from dataclasses import fields
from pathlib import Path

import compress as script
import numpy as np
import pytest
from compress_arguments import COMMANDS, MAX_DIMS
from conftest import bomb, build_model
from PIL import Image

import hf_pixelcnn
from hf_pixelcnn import PixelCNNImageProcessor, compression
from hf_pixelcnn.compressed_stream import read_stream
from hf_pixelcnn.training import InputError

pytestmark = pytest.mark.slow

DIGITS = str(Path(__file__).parent / "data" / "mnist_digits")


@pytest.fixture
def saved(tmp_path):
    """Folder of a model of all 256 levels, and one of 7 images of 6×5 pixels."""
    build_model("gated_pixelcnn", num_levels=256).save_pretrained(tmp_path / "model")
    PixelCNNImageProcessor(num_levels=256).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(7, 5, 6), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"photo {index}.{'bmp' if index == 3 else 'png'}")
    return tmp_path / "model", tmp_path / "images"


def run(*words):
    script.main([str(word) for word in words])


def test_a_folder_comes_back_pixel_by_pixel_under_its_names(saved, tmp_path, capsys):
    model, images = saved
    stream, restored = tmp_path / "x.pxc", tmp_path / "restored"
    run("compress", "--model", model, "--input", images, "--output", stream, "--verify", "true")
    assert "note:" not in capsys.readouterr().out
    run("verify", "--model", model, "--input", stream)
    assert "is sound: 7 images" in capsys.readouterr().out
    run("decompress", "--model", model, "--input", stream, "--output", restored)
    for file in images.iterdir():
        restored_file = restored / f"{file.stem}.png"
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(restored_file)))
    assert len(list(restored.iterdir())) == 7


def test_one_file_comes_back_as_one_file(saved, tmp_path):
    model, images = saved
    run("compress", "--model", model, "--input", images / "photo 2.png", "--output", tmp_path / "x.pxc")
    run("decompress", "--model", model, "--input", tmp_path / "x.pxc", "--output", tmp_path / "back.png")
    assert np.array_equal(*(np.asarray(Image.open(p)) for p in (images / "photo 2.png", tmp_path / "back.png")))


def test_what_levels_do_not_keep_is_said(saved, tmp_path, capsys):
    model, images = saved
    build_model("gated_pixelcnn", num_classes=2, id2label={0: "cow", 1: "cat"}).save_pretrained(model)
    PixelCNNImageProcessor(num_levels=2).save_pretrained(model)
    Image.fromarray(np.full((5, 6), 255, dtype=np.uint8)).save(images / "white.png")  # white stays white
    words = ["--model", model, "--input", images, "--output", tmp_path / "x.pxc"]
    run("compress", *words)
    assert "note: 7 of 8 images have pixels that the model's 2 levels do not keep" in capsys.readouterr().out
    sizes = {}
    for classes in (["1"], ["cat"], ["-1"], [*"01010101"], ["0"]):
        run("compress", *words, "--class_ids", *classes)
        sizes[" ".join(classes)] = (tmp_path / "x.pxc").read_bytes()
    assert sizes["1"] == sizes["cat"]
    assert len(set(sizes.values())) == 4
    for classes, message in ((["2"], "`class_ids` must be 0"), (["dog"], "no class 'dog'"), ([*"01"], r"shape \(8,\)")):
        with pytest.raises(SystemExit, match=message):
            run("compress", *words, "--class_ids", *classes)


def test_transparency_that_is_not_kept_is_said(saved, tmp_path, capsys):
    model, images = saved
    for name, transparency in (("plain.png", None), ("clear.png", 3)):
        options = {} if transparency is None else {"transparency": transparency}
        Image.open(images / "photo 0.png").save(tmp_path / name, **options)
        run("compress", "--model", model, "--input", tmp_path / name, "--output", tmp_path / "x.pxc")
        assert ("note: 1 of 1 images have pixels" in capsys.readouterr().out) == (transparency is not None)


def test_measuring_reports_size_and_time(saved, tmp_path, capsys):
    model, _ = saved
    build_model("gated_pixelcnn", num_classes=10).save_pretrained(model)
    PixelCNNImageProcessor(num_levels=2, size=6).save_pretrained(model)
    words = ["--dataset", DIGITS, "--split", "test[:20]", "--cache_dir", tmp_path / "cache"]
    run("measure", "--model", model, *words, "--output", tmp_path / "codec.json")
    assert "restored exactly: True" in capsys.readouterr().out
    results = json.loads((tmp_path / "codec.json").read_text())
    assert results["num_dims"] == 20 * 36
    assert 1 < results["overhead"] < 1 + 64 / (720 * results["model_bits_per_dim"])
    assert results["seconds"].keys() == {"compress", "decompress", "sample"}


def test_bits_of_classes_are_those_of_the_adaptive_code():
    import torch

    class_ids, counts, expected = torch.tensor([2, 2, -1, 0, 2]), np.ones(4), 0.0
    for class_id in class_ids.tolist():
        expected -= np.log2(counts[class_id + 1] / counts.sum())
        counts[class_id + 1] += 1
    assert script.adaptive_bits(class_ids, num_classes=3) == pytest.approx(expected)


def test_a_stream_chooses_no_path():
    for names in [
        "../up.png",
        "/root.png",
        "a/b.png",
        "a\\b.png",
        "C:x.png",
        "",
        ".hidden",
        "two\nlines",
        "a\0b",
        "x" * 300,
    ]:
        with pytest.raises(InputError):
            script.unpack_names(zlib.compress(names.encode()), 1)
        with pytest.raises(InputError):
            script.pack_names([names])


def test_names_that_would_collide_are_kept_apart():
    comment = script.pack_names(["a.png", "a.bmp", "b.gif", "a"])
    assert script.unpack_names(comment, 4) == ["a.png.png", "a.bmp.png", "b.png", "a.png"]
    for names, text in {
        ("a.png", "a.png"): r"a\.png and a\.png would both come back as a\.png\.png",
        ("a.b.png", "b", "a.b.bmp", "a.b.bmp.jpg"): r"a\.b\.bmp and a\.b\.bmp\.jpg would both come back",
    }.items():
        comment = script.pack_names(names)
        with pytest.raises(InputError, match=text):
            script.unpack_names(comment, len(names))
    assert script.unpack_names(b"", 2) == ["00000.png", "00001.png"]
    for comment in (b"no zlib", zlib.compress(b"\xff"), zlib.compress(b"a" * 10**6)):
        with pytest.raises(InputError):
            script.unpack_names(comment, 1)


def refusal(*words):
    with pytest.raises(SystemExit) as error:
        run(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_source_is_never_overwritten(saved, tmp_path):
    model, images = saved
    one, link = images / "photo 1.png", tmp_path / "link.png"
    link.symlink_to(one)
    before = {file: file.read_bytes() for file in images.iterdir()}
    pack = ["compress", "--model", model, "--input"]
    assert "--output is --input" in refusal(*pack, one, "--output", one)
    assert "--output is --input" in refusal(*pack, one, "--output", images / ".." / "images" / one.name)
    assert "--output is --input" in refusal(*pack, one, "--output", link)
    for output in (images / "x.pxc", one):
        assert "lies inside --input" in refusal(*pack, images, "--output", output)
    for output in (images, tmp_path):
        assert "--output must be a file" in refusal(*pack, one, "--output", output)
    assert "lies inside --input" not in refusal(*pack, images / "none", "--output", tmp_path / "x.pxc")
    stream = tmp_path / "stream.png"
    run(*pack, one, "--output", stream)
    unpack = ["decompress", "--model", model, "--input", stream, "--output"]
    assert "--output is --input" in refusal(*unpack, stream)
    assert {file: file.read_bytes() for file in images.iterdir()} == before


@pytest.mark.parametrize("name", ["pages.tiff", "film.gif", "film.png"])
def test_further_pages_are_refused(saved, tmp_path, name):
    model, _ = saved
    first, *others = (Image.new("L", (6, 5), shade) for shade in (0, 100, 200))
    first.save(tmp_path / name, save_all=True, append_images=others)
    message = refusal("compress", "--model", model, "--input", tmp_path / name, "--output", tmp_path / "x.pxc")
    assert f"{tmp_path / name} has 3 pages or frames" in message


def test_images_in_subfolders_are_refused_by_name(saved, tmp_path):
    model, images = saved
    for folder, file in ((".hidden", "a.png"), ("notes", "a.md"), ("notes", ".a.png")):
        (images / folder).mkdir(exist_ok=True)
        Image.new("L", (6, 5)).save(images / folder / file, format="png")
    words = ["compress", "--model", model, "--input", images, "--output", tmp_path / "x.pxc"]
    run(*words)
    (images / "more" / "deep").mkdir(parents=True)
    Image.new("L", (6, 5)).save(images / "more" / "deep" / "a.png")
    assert f"{images / 'more' / 'deep' / 'a.png'} lies in a subfolder" in refusal(*words)


def test_names_that_cannot_come_back_are_refused_when_they_are_compressed(saved, tmp_path):
    model, images = saved
    for name in ("img.jpg", "img.png", "img.png.bmp"):
        Image.new("L", (6, 5)).save(images / name)
    words = ["compress", "--model", model, "--input", images, "--output", tmp_path / "x.pxc", "--verify", "true"]
    assert "img.png and img.png.bmp would both come back as img.png.png: rename one of them" in refusal(*words)
    (images / "img.png.bmp").unlink()
    run(*words)
    run("decompress", "--model", model, "--input", tmp_path / "x.pxc", "--output", tmp_path / "restored")
    assert {"img.jpg.png", "img.png.png"} <= {file.name for file in (tmp_path / "restored").iterdir()}


def test_a_photo_that_was_turned_comes_back_upright(saved, tmp_path, capsys):
    model, _ = saved
    pixels = np.random.default_rng(1).integers(256, size=(6, 5), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    run("compress", "--model", model, "--input", tmp_path / "photo.png", "--output", tmp_path / "x.pxc")
    assert "note:" not in capsys.readouterr().out
    run("decompress", "--model", model, "--input", tmp_path / "x.pxc", "--output", tmp_path / "back.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "back.png")), np.rot90(pixels, -1))


def no_space(path, data=b""):
    """A write to a full disk."""
    with open(path, "wb") as file:
        file.write(data[:20])
    raise OSError(28, "No space left on device")


def test_what_cannot_be_written_whole_leaves_what_was_there(saved, tmp_path, monkeypatch):
    model, images = saved
    stream, one, restored = tmp_path / "x.pxc", tmp_path / "one.png", tmp_path / "restored"
    pack = ["compress", "--model", model, "--output", stream, "--input"]
    run(*pack, images / "photo 1.png")
    restored.mkdir()
    one.write_text("old")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    save, saves = Image.Image.save, []

    def save_some(image, path, *args, **kwargs):
        """Writes half a picture in the third call."""
        saves.append(path)
        assert not any(restored.iterdir())
        save(image, path, *args, **kwargs)
        if len(saves) == 3:
            no_space(path)

    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", no_space)
        assert "No space left" in refusal(*pack, images)
    run(*[*pack[:4], tmp_path / "all.pxc", *pack[5:]], images)
    unpack = ["decompress", "--model", model, "--input", tmp_path / "all.pxc", "--output"]
    with monkeypatch.context() as full:
        full.setattr(Image.Image, "save", save_some)
        assert "No space left" in refusal(*unpack, restored)
        saves[:] = "ab"
        assert "No space left" in refusal("decompress", "--model", model, "--input", stream, "--output", one)
    (tmp_path / "all.pxc").rename(tmp_path.parent / "all.pxc")
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before
    unpack[4] = tmp_path.parent / "all.pxc"
    run(*unpack, restored)
    assert len(list(restored.iterdir())) == 7
    monkeypatch.chdir(images.parent / "model")
    assert "must be a folder to make inside one that exists" in refusal(*unpack, tmp_path / "no" / "folder")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "must be a folder to make inside one that exists" in refusal(*unpack, ".")


def test_names_that_this_file_system_takes_for_one_are_not_written_over_each_other(tmp_path):
    with pytest.raises(InputError, match=r"a\.png differs from another name only in case"):
        script.write_folder(tmp_path / "new", ["a.png", "a.png"], [Image.new("L", (2, 2))] * 2)
    assert not list(tmp_path.iterdir())


def test_each_command_has_help_of_its_own(capsys):
    for command in [None, *COMMANDS]:
        with pytest.raises(SystemExit) as ended:
            run(*([command] if command else []), "--help")
        assert ended.value.code == 0
        text = capsys.readouterr().out
        if command is None:
            assert all(name in text for name in COMMANDS)
            assert "--verify true" in text  # the documented command lines
            continue
        options = {f"--{field.name}" for field in fields(COMMANDS[command])}
        assert options <= set(re.findall(r"--\w+", text))
        assert ("--verify" in text) == (command == "compress")
    assert compression.MAX_DIMS == MAX_DIMS  # written twice, as that module imports torch


def test_bad_input_is_answered_in_one_line(saved, tmp_path):
    model, images = saved
    stream, other = tmp_path / "x.pxc", tmp_path / "other"
    run("compress", "--model", model, "--input", images, "--output", stream)
    damaged = tmp_path / "damaged.pxc"
    damaged.write_bytes(stream.read_bytes()[:-1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "bomb.png").write_bytes(bomb())
    build_model("gated_pixelcnn", num_levels=256, seed=1).save_pretrained(other)
    no_processor = tmp_path / "no_processor"
    build_model("gated_pixelcnn").save_pretrained(no_processor)
    PixelCNNImageProcessor(num_levels=256).save_pretrained(other)
    pack = ["compress", "--model", model, "--output", tmp_path / "y.pxc", "--input"]
    unpack = ["decompress", "--model", model, "--output", tmp_path / "z", "--input"]
    for words, text in [
        ([], "required: {compress,decompress,verify,measure}"),
        (["shrink"], "invalid choice: 'shrink'"),
        (pack[:-1], "--input"),
        ([*pack, images, "--split", "test"], "unknown argument '--split'"),
        ([*pack, tmp_path / "nothing"], "there is no file or folder"),
        ([*pack, tmp_path / "empty"], "there is no image"),
        ([*pack, tmp_path / "text.png"], "cannot be used as an image"),
        ([*pack, tmp_path / "bomb.png"], r"cannot be used as an image: .*\(3600000000 pixels\) exceeds"),
        ([*pack, images, "--class_ids", "3"], "unconditional"),
        (["compress", "--model", model, "--input", images, "--output", "nowhere/x.pxc"], "its folder does not exist"),
        (["compress", "--model", no_processor, "--input", images, "--output", "x.pxc"], "no image processor"),
        ([*unpack, tmp_path / "nothing"], "cannot read"),
        ([*unpack, damaged], "is cut"),
        (["decompress", "--model", other, "--input", stream, "--output", tmp_path / "z"], "weights are others"),
        (["decompress", "--model", model, "--input", stream, "--output", tmp_path / "z.png"], "must be a folder"),
        (["decompress", "--model", model, "--input", stream, "--output", tmp_path / "z.jpg"], "only PNG"),
        (["decompress", "--model", model, "--input", stream, "--output", images], "must be a new or empty folder"),
        (["verify", "--model", model, "--input", images / "photo 1.png"], "Not a compressed stream"),
    ]:
        with pytest.raises(SystemExit, match=text) as error:
            run(*words)
        assert "\n" not in str(error.value)
    Image.new("L", (9, 9)).save(images / "photo x.png")
    with pytest.raises(SystemExit, match=r"gives 6×5 pixels and photo x\.png 9×9"):
        run(*pack, images)
    assert not (tmp_path / "y.pxc").exists()
    assert not (tmp_path / "z").exists()


def test_a_file_is_exactly_what_the_library_reads(saved, tmp_path):
    model, images = saved
    run("compress", "--model", model, "--input", images, "--output", tmp_path / "x.pxc")
    data = (tmp_path / "x.pxc").read_bytes()
    levels = hf_pixelcnn.decompress(hf_pixelcnn.GatedPixelCNNForCausalImageModeling.from_pretrained(model), data)
    assert list(levels.shape) == read_stream(data).header.shape == [7, 1, 5, 6]
