import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, build_model, seeded
from PIL import Image
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from hf_pixelcnn import PixelCNNImagePipeline, PixelCNNImageProcessor

pytestmark = pytest.mark.versions


@pytest.fixture
def folder(family, tmp_path):
    model = build_model(family, num_levels=4, num_classes=3, id2label={0: "cat", 1: "dog", 2: "cow"})
    model.save_pretrained(tmp_path)
    PixelCNNImageProcessor(num_levels=4).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def pipe(folder):
    return pipeline("unconditional-image-generation", model=folder, device="cpu")


def test_the_pipeline_draws_what_generate_draws(pipe):
    assert type(pipe) is PixelCNNImagePipeline
    images = pipe(class_ids=1, num_images=3, generator=seeded()).images
    levels = pipe.model.generate(class_ids=1, num_images=3, generator=seeded())
    assert [np.asarray(image).tolist() for image in images] == [
        np.asarray(image).tolist() for image in pipe.image_processor.post_process(levels)
    ]
    parts = pipe(class_ids=1, num_images=3, batch_size=2, generator=seeded(), output_type="pt").images
    assert torch.equal(parts, pipe.image_processor.post_process(levels, output_type="pt"))
    (array,) = pipe(3, class_ids=1, generator=seeded(), output_type="np", return_dict=False)
    assert array.shape == (3, 5, 6, 1)
    assert np.array_equal(array[..., 0], parts[:, 0].numpy())


def test_classes_have_names(pipe):
    by_name = pipe(class_ids=["dog", "cow"], generator=seeded(), output_type="pt").images
    assert torch.equal(by_name, pipe(class_ids=[1, 2], generator=seeded(), output_type="pt").images)
    with pytest.raises(ValueError, match=r"no class 'bird'; the model has \['cat', 'dog', 'cow'\]"):
        pipe(class_ids="bird")


def test_given_images_are_completed(pipe):
    given = pipe(class_ids=0, num_images=2, generator=seeded()).images
    upper = np.zeros((5, 6), dtype=bool)
    upper[:3] = True
    for mask in (upper, upper.tolist(), torch.tensor(upper), Image.fromarray(upper)):
        completed = pipe(images=given, known_mask=mask, class_ids=0, generator=seeded(1)).images
        for image, original in zip(completed, given, strict=True):
            assert np.array_equal(np.asarray(image)[:3], np.asarray(original)[:3])


def test_completions_that_heed_what_comes_later_say_how_many_were_good(pipe):
    given = pipe(class_ids=0, num_images=2, generator=seeded()).images
    left = np.arange(6) < np.full((5, 1), 3)
    output = pipe(images=given, known_mask=left, class_ids=0, num_resamples=5, generator=seeded(1))
    for image, original in zip(output.images, given, strict=True):
        assert np.array_equal(np.asarray(image)[left], np.asarray(original)[left])
    assert output.effective_sample_size.shape == (2,)
    assert (output.effective_sample_size > 1).all()
    assert (output.effective_sample_size <= 5).all()
    assert pipe(class_ids=0).effective_sample_size is None


def test_a_batch_size_alone_is_a_number_of_images(family, tmp_path):
    build_model(family).save_pretrained(tmp_path)
    PixelCNNImageProcessor(num_levels=2).save_pretrained(tmp_path)
    pipe = pipeline("unconditional-image-generation", model=str(tmp_path))
    assert len(pipe(batch_size=4).images) == 4
    with pytest.raises(ValueError, match="`max_batch_size` must be at least 1, got 0"):
        pipe(batch_size=0)
    assert len(pipe().images) == 1
    assert len(pipe(generator=[seeded(), seeded(1)]).images) == 2


def test_settings_given_when_it_is_made_are_kept(folder):
    pipe = pipeline("unconditional-image-generation", model=folder, do_sample=False)
    images = pipe(class_ids=[0, 0], output_type="pt").images
    assert torch.equal(images[0], images[1])


def test_a_saved_pipeline_loads_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = pipeline("unconditional-image-generation", model=str(tmp_path / "saved"))
    images = [p(class_ids=2, generator=seeded(), output_type="pt").images for p in (pipe, again)]
    assert torch.equal(*images)
    assert (tmp_path / "saved" / "pipeline_causal_image.py").exists()


def test_a_model_without_an_image_processor_gets_one_from_its_config_with_a_notice(folder, pipe, caplog):
    os.remove(f"{folder}/preprocessor_config.json")
    without = pipeline("unconditional-image-generation", model=folder, device="cpu")
    assert f"{folder} has no image processor" in caplog.text
    assert "4 levels" in caplog.text
    images = [p(class_ids=2, generator=seeded(), output_type="pt").images for p in (pipe, without)]
    assert torch.equal(*images)


def test_a_broken_image_processor_is_an_error(folder):
    path = Path(folder, "preprocessor_config.json")
    path.write_text(path.read_text()[:20])
    with pytest.raises(OSError, match=r"preprocessor_config.json' is not a valid JSON file"):
        pipeline("unconditional-image-generation", model=folder)


def test_an_image_processor_of_another_model_is_refused(folder, pipe):
    for name, value, own in [("num_levels", 256, 4), ("num_channels", 3, 1)]:
        other = PixelCNNImageProcessor(**{"num_levels": 4, name: value})
        with pytest.raises(ValueError, match=f"`{name}` {value}, but the model has {own}: .* one with `{name}={own}`"):
            PixelCNNImagePipeline(pipe.model, image_processor=other)
        other.save_pretrained(folder)
        with pytest.raises(ValueError, match=f"`{name}` {value}, but the model has {own}"):
            pipeline("unconditional-image-generation", model=folder)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_feature_extraction_gives_the_features_of_images_without_a_class(family, num_classes, tmp_path):
    folder, processor = str(tmp_path), PixelCNNImageProcessor(num_levels=4)
    model = build_model(family, num_levels=4, num_classes=num_classes).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    images = [Image.fromarray(np.random.default_rng(i).integers(256, size=(5, 6), dtype=np.uint8)) for i in (0, 1)]
    network = FAMILIES[family].model_class.from_pretrained(folder)
    extract = pipeline("image-feature-extraction", model=network, image_processor=folder, device="cpu")
    features = torch.cat(extract(images, return_tensors=True))
    levels = processor(images, return_tensors="pt")["pixel_values"]
    class_ids = torch.tensor([-1, -1]) if num_classes else None
    torch.testing.assert_close(features, model.model(levels, class_ids=class_ids).last_hidden_state)

    extract = pipeline("image-feature-extraction", model=folder, device="cpu")  # by AutoModel, which has a head
    if num_classes == 0:
        logits = extract(images[0], return_tensors=True)
        torch.testing.assert_close(logits, model(levels[:1]).logits)
        return
    call = rf'"image-feature-extraction", model={type(network).__name__}\.from_pretrained\(folder\), image_processor='
    with pytest.raises(ValueError, match=rf"Features need no class.*`pipeline\({call}folder\)`"):
        extract(images[0])


def test_several_requests_are_answered_in_order(pipe):
    requests = [2, {"class_ids": "dog"}, {"num_images": 2, "class_ids": 2, "output_type": "np"}]
    generator = seeded()
    one_by_one = [
        pipe(2, generator=generator),
        pipe(class_ids=1, generator=generator),
        pipe(2, class_ids=2, generator=generator),
    ]
    answers = pipe(requests, seed=0)
    assert isinstance(answers, list)
    assert [len(answer.images) for answer in answers] == [2, 1, 2]
    for answer, expected in zip(answers, one_by_one, strict=True):
        for image, same in zip(answer.images, expected.images, strict=True):
            assert np.array_equal(np.squeeze(image), np.asarray(same))
    asked = []
    lazy = pipe((asked.append(n) or n for n in (1, 2)), seed=0)
    assert asked == []
    assert len(next(lazy).images) == 1
    assert asked == [1]
    assert [len(answer.images) for answer in pipe(torch.utils.data.StackDataset(num_images=[1, 3]))] == [1, 3]
    for neither in ("3", 2.0, np.int64(2), torch.tensor(2), {"num_images": 2}):
        with pytest.raises(TypeError, match="`num_images` must be an int, got "):
            pipe(neither)


def test_a_seed_stands_for_a_generator_and_classes_are_drawn_in_turn(pipe):
    images = pipe(seed=3, output_type="pt").images
    assert torch.equal(images, pipe(class_ids=[0, 1, 2], generator=seeded(3), output_type="pt").images)
    more = pipe(5, seed=3, output_type="pt").images
    assert torch.equal(more, pipe(class_ids=[0, 1, 2, 0, 1], generator=seeded(3), output_type="pt").images)
    with pytest.raises(ValueError, match="`seed` and `generator`"):
        pipe(seed=0, generator=seeded())
    for seed in ("3", 1.5, 2**65):
        with pytest.raises(ValueError, match="`seed` must be an int of 64 bits"):
            pipe(seed=seed)
    with pytest.raises(ValueError, match="`output_type` must be"):
        pipe(output_type="array", streamer=lambda *row: pytest.fail("it was drawn"))


def test_images_to_complete_may_be_files_and_come_from_any_iterable(pipe, tmp_path):
    pictures = pipe(class_ids=0, num_images=2, seed=0).images
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, image in zip(paths, pictures, strict=True):
        image.save(path)
    upper = np.arange(5)[:, None] < np.full((1, 6), 3)
    expected = pipe(images=pictures, known_mask=upper, class_ids=0, seed=1, output_type="pt").images
    rows = torch.utils.data.StackDataset(image=pictures, label=[0, 0])
    for images in (paths, [str(path) for path in paths], (image for image in pictures), rows):
        assert torch.equal(
            pipe(images=images, known_mask=upper, class_ids=0, seed=1, output_type="pt").images, expected
        )
    drawn_mask = Image.fromarray(np.where(upper, 255, 100).astype(np.uint8))
    drawn_mask.save(tmp_path / "mask.png")
    for mask in (drawn_mask, drawn_mask.convert("RGB"), str(tmp_path / "mask.png"), np.array(drawn_mask) > 127):
        again = pipe(images=pictures, known_mask=mask, class_ids=0, seed=1, output_type="pt").images
        assert torch.equal(again, expected)
    first = pipe(images=str(paths[0]), known_mask=upper, class_ids=0, seed=1, output_type="pt").images
    assert torch.equal(first, expected[:1])
    with pytest.raises(ValueError, match=r"Rows of `images` must have an image named 'image', got \['picture'\]"):
        pipe(images=[{"picture": None}], known_mask=upper)


def test_a_pipeline_without_a_task_needs_no_trust_where_its_code_is_registered(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "saved")
    again = pipeline(model=str(tmp_path / "saved"), device="cpu")
    assert type(again) is PixelCNNImagePipeline
    assert torch.equal(again(seed=0, output_type="pt").images, pipe(seed=0, output_type="pt").images)
    monkeypatch.delitem(PIPELINE_REGISTRY.supported_tasks, "pixelcnn-image-generation")
    with pytest.raises(ValueError, match="trust_remote_code"):
        pipeline(model=str(tmp_path / "saved"), device="cpu")
