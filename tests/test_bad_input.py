"""Mistakes are answered by an error that names the argument, what came and what would work, before any work."""

import inspect
import io
import pydoc
import re

import numpy as np
import pytest
import torch
from conftest import FAMILIES, build_model
from huggingface_hub.errors import StrictDataclassError
from PIL import ExifTags, Image

from hf_pixelcnn import PixelCNNGenerationConfig
from hf_pixelcnn.checks_causal_image import mask_of

pytestmark = pytest.mark.versions


def levels(*shape, value=0, dtype=torch.long):
    return torch.full(shape, value, dtype=dtype)


def test_wrong_pixel_values():
    cases = [
        (
            levels(1, 3, 5, 6).float(),
            TypeError,
            "`pixel_values` must be integer levels 0 ... 3, got dtype torch.float32",
        ),
        (levels(1, 3, 5, 6).bool(), TypeError, "got dtype torch.bool"),
        (levels(1, 3, 5, 6, value=4), ValueError, r"0 ... 3 \(`num_levels` is 4\), got values from 4 to 4"),
        (levels(1, 3, 5, 6, value=-1), ValueError, "got values from -1 to -1"),
        (levels(1, 3, 5, 6, value=255, dtype=torch.uint8), ValueError, "got values from 255 to 255"),
        (levels(1, 1, 5, 6), ValueError, r"must have shape \(batch, 3, height, width\), got \(1, 1, 5, 6\)"),
        (levels(3, 5, 6), ValueError, r"must have shape \(batch, 3, height, width\), got \(3, 5, 6\)"),
        (levels(0, 3, 5, 6), ValueError, "`pixel_values` is empty"),
        ([[0]], TypeError, "`pixel_values` must be a torch.Tensor of integer levels, got list"),
    ]
    for pixel_values, error, message in cases:
        for family in FAMILIES:
            model = build_model(family, num_channels=3, num_levels=4)
            for call in (model, model.model, model.log_prob):
                with pytest.raises(error, match=message):
                    call(pixel_values)


def test_wrong_class_ids():
    cases = [
        (None, ValueError, "`class_ids` are needed: the model is conditional on 3 classes"),
        (torch.tensor([3, 0]), ValueError, "must be 0 ... 2, or -1 for no class, got values from 0 to 3"),
        (torch.tensor([-2, 0]), ValueError, "got values from -2 to 0"),
        (torch.tensor([0.0, 1.0]), TypeError, "`class_ids` must be a LongTensor, got torch.float32"),
        (torch.tensor([0]), ValueError, r"`class_ids` must have shape \(2,\), one per image, got \(1,\)"),
    ]
    for family in FAMILIES:
        model = build_model(family, num_classes=3)
        with pytest.raises(TypeError, match="`class_ids` must be a LongTensor, got list"):
            model(levels(2, 1, 5, 6), class_ids=[0, 1])
        for class_ids, error, message in cases:
            for call in (model, model.log_prob):
                with pytest.raises(error, match=message):
                    call(levels(2, 1, 5, 6), class_ids=class_ids)


def test_class_ids_for_an_unconditional_model(family):
    model = build_model(family)
    for call in (lambda **c: model(levels(2, 1, 5, 6), **c), model.generate):
        with pytest.raises(ValueError, match="`class_ids` were given, but the model is unconditional"):
            call(class_ids=torch.tensor([0, 1]))


def test_wrong_arguments_of_generate():
    cases = [
        (
            {"sampler": "quantum"},
            ValueError,
            r"one of \['cached', 'fixed_point', 'naive'\], got 'quantum'",
        ),
        (
            {"sampler": "fixed_point", "output_scores": True},
            ValueError,
            "takes no .* gives no scores",
        ),
        ({"sampler": "fixed_point", "logits_processor": [print]}, ValueError, "takes no `logits_processor`"),
        ({"streamer": 3}, TypeError, "`streamer` must be callable, got int"),
        ({"max_batch_size": 0}, ValueError, "`max_batch_size` must be at least 1, got 0"),
        ({"num_beams": 4}, ValueError, r"unknown arguments \['num_beams'\]"),
        ({"max_length": 4}, ValueError, r"unknown arguments \['max_length'\]"),
        ({"num_images": 0}, ValueError, "`num_images` must be at least 1, got 0"),
        ({"num_images": 2.0}, TypeError, "`num_images` must be an int, got 2.0"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be above 0, got 0.0"),
        ({"top_k": -1}, ValueError, "`top_k` must be at least 0"),
        ({"top_k": 2.5}, TypeError, "`top_k` must be an int, got 2.5"),
        ({"top_p": "a"}, TypeError, "`top_p` must be a number, got 'a'"),
        ({"do_sample": "no"}, TypeError, "`do_sample` must be True or False, got 'no'"),
        ({"image_size": 5.0}, ValueError, "`image_size` must be a positive int or"),
        ({"image_size": (5.0, 5)}, ValueError, "`image_size` must be a positive int or"),
        ({"image_size": True}, ValueError, "`image_size` must be a positive int or"),
        ({"max_batch_size": 2.5}, TypeError, "`max_batch_size` must be an int, got 2.5"),
        ({"logits_processor": print}, TypeError, "`logits_processor` must be a list"),
        ({"logits_processor": [3]}, TypeError, "`logits_processor` must be a list of callables"),
        ({"temperature": 10**400}, ValueError, "`temperature` must be a number that a float can hold, got one of 1329"),
        ({"guidance_scale": 10**400}, ValueError, "`guidance_scale` must be a number that a float can hold"),
        ({"num_images": 10**12}, torch.OutOfMemoryError, "takes at least 480,000,000,000,000 bytes of memory on cpu"),
        ({"image_size": 10**12}, torch.OutOfMemoryError, "Drawing 1 images of 1×10+×10+ takes at least"),
        (
            {"num_resamples": 10**30, "pixel_values": levels(1, 1, 5, 6), "known_mask": torch.ones(5, 6).bool()},
            torch.OutOfMemoryError,
            "takes at least",
        ),
        ({"class_ids": "3"}, ValueError, "There is no class '3'"),
        ({"class_ids": ["3"]}, ValueError, "There is no class '3'"),
        ({"class_ids": [2**70]}, ValueError, "`class_ids` must be -1 ... -1, got an integer of over 64 bits"),
        ({"class_ids": [1, None]}, TypeError, "`class_ids` must be ids or names of classes, got None"),
        (
            {"generation_config": {"temperature": 0.5}},
            TypeError,
            "`generation_config` must be a GenerationConfig, got d",
        ),
        ({"generator": [torch.Generator(), 3]}, TypeError, "`generator` must be a torch.Generator or a list.*got int"),
        ({"pixel_values": [[0]]}, ValueError, "`pixel_values` must be a tensor of shape .*, got list"),
        ({"class_ids": torch.zeros(2, 2).long()}, ValueError, "`class_ids` must be one class or a list"),
        ({"top_p": 1.5}, ValueError, r"`top_p` must be in \(0, 1\], got 1.5"),
        ({"min_p": -0.1}, ValueError, r"`min_p` must be in \[0, 1\], got -0.1"),
        ({"image_size": (4, 5, 6)}, ValueError, "`image_size` must be a positive int or"),
        ({"generator": [torch.Generator()] * 3, "num_images": 2}, ValueError, "disagree about the number of images"),
        ({"generator": []}, ValueError, "Nothing to draw"),
        ({"generator": 0}, TypeError, "`generator` must be a torch.Generator or a list of them, got int"),
        ({"pixel_values": levels(1, 1, 5, 6)}, ValueError, "`pixel_values` needs `known_mask`"),
        ({"known_mask": torch.ones(5, 6).bool()}, ValueError, "`known_mask` needs `pixel_values`"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            build_model("pixelcnn").generate(**arguments)


def test_wrong_images_to_complete():
    model = build_model("pixelcnn", num_levels=4)
    given, mask = levels(2, 1, 5, 6), torch.ones(5, 6, dtype=torch.bool)
    for wrong, got in [
        (mask.float(), "torch.float32. Of numbers: `mask > 0`"),
        (mask.numpy().astype(np.uint8), "uint8. Of numbers"),
        ("mask.png", "str."),
        ([[1, 0], [0, 1]], "int64. Of numbers"),
        ([["a"]], "<U1"),
    ]:
        with pytest.raises(ValueError, match=rf"`known_mask` must be True where .*, or a picture .*, got {got}"):
            model.generate(pixel_values=given, known_mask=wrong)
    with pytest.raises(ValueError, match=r"`known_mask` must be broadcastable to the images drawn.*got \(6, 5\)"):
        model.generate(pixel_values=given, known_mask=mask.T)
    with pytest.raises(ValueError, match="disagree about the number of images"):
        model.generate(pixel_values=given, known_mask=mask, num_images=3)
    with pytest.raises(ValueError, match=r"`pixel_values` must be levels 0 \.\.\. 3"):
        model.generate(pixel_values=given + 4, known_mask=mask)
    with pytest.raises(TypeError, match="`pixel_values` must be integer levels"):
        model.generate(pixel_values=given.float(), known_mask=mask)
    with pytest.raises(ValueError, match="`pixel_values` must have 1 channels, got 3"):
        model.generate(pixel_values=levels(2, 3, 5, 6), known_mask=mask)
    with pytest.raises(ValueError, match=r"`image_size` \[4, 4\] is not the size of `pixel_values`"):
        model.generate(pixel_values=given, known_mask=mask, image_size=4)


def test_pictures_of_masks_are_upright_and_have_white_where_pixels_are_given():
    given, turned = np.array([[True, False, False], [True, True, False]]), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    Image.fromarray(np.rot90(given)).save(file, "PNG", exif=turned)
    assert mask_of(Image.open(file)).tolist() == given.tolist()
    assert not mask_of(Image.new("L", (3, 2))).any()
    with pytest.raises(ValueError, match="nowhere white, its lightest pixel is 1 of 255"):
        mask_of(Image.fromarray(given.astype(np.uint8)))
    for dtype in (np.uint16, np.int32, np.float32):
        with pytest.raises(ValueError, match=r"what is white in a picture of mode .* is not said; make it mode L"):
            mask_of(Image.fromarray(given.astype(dtype)))


def test_wrong_classes_to_generate(family):
    model = build_model(family, num_classes=3)
    with pytest.raises(ValueError, match="`class_ids` are needed"):
        model.generate()
    with pytest.raises(ValueError, match=r"`class_ids` must be 0 \.\.\. 2"):
        model.generate(class_ids=3)
    with pytest.raises(ValueError, match="disagree about the number of images"):
        model.generate(class_ids=[0, 1], num_images=3)
    assert model.generate(class_ids=1, num_images=3).shape == (3, 1, 5, 6)
    assert model.generate(class_ids=[0, -1]).shape == (2, 1, 5, 6)


def test_a_model_without_weights_draws_nothing():
    with pytest.raises(ValueError, match="The model is on the meta device"):
        build_model("pixelcnn").to("meta").generate()


def test_a_processor_of_another_shape_is_refused_and_cannot_change_the_canvas():
    model = build_model("pixelcnn", num_levels=4)
    for result, got in ((lambda scores: scores[:, :1], r"\(5, 1\)"), (lambda scores: None, "NoneType")):
        message = r"A logits processor must keep the shape of the scores, \(5, 4\), got " + got
        with pytest.raises(ValueError, match=message):
            model.generate(num_images=5, logits_processor=[lambda _, scores, result=result: result(scores)], top_k=2)

    def meddle(levels, scores):
        levels.fill_(3)
        return scores

    drawn = [
        model.generate(generator=torch.Generator().manual_seed(0), logits_processor=processors)
        for processors in ([meddle], None)
    ]
    assert torch.equal(*drawn)


def test_an_error_leaves_the_mode_alone():
    model = build_model("pixelcnn").train()

    def broken(levels, scores):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.generate(logits_processor=[broken])
    assert model.training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_levels_out_of_range_on_a_gpu_are_an_error_and_no_device_assert(family):
    model = build_model(family, num_levels=4, input_encoding="embedding", num_classes=3).cuda()
    with pytest.raises(ValueError, match="`pixel_values` must be levels"):
        model(levels(1, 1, 5, 6, value=9).cuda(), class_ids=torch.tensor([0]).cuda())
    with pytest.raises(ValueError, match=r"`class_ids` must be 0 \.\.\. 2"):
        model(levels(1, 1, 5, 6).cuda(), class_ids=torch.tensor([7]).cuda())
    assert torch.isfinite(model(levels(1, 1, 5, 6).cuda(), class_ids=torch.tensor([0]).cuda()).logits).all()


def test_errors_know_what_was_meant():
    """What students and users of other libraries try first; the answer is in the message."""
    model = build_model("pixelcnn", num_levels=4, num_classes=3)
    class_ids, generate = torch.tensor([0]), model.generate
    image = torch.rand(1, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    for floats, meant in [
        (levels(1, 1, 5, 6, value=1).float(), "`.long()` makes them levels"),
        (image, "as ToTensor makes them: PixelCNNImageProcessor"),
        (image * 2 - 1, "undo that (`x * std + mean`)"),
        ((image * 255).round(), "PixelCNNImageProcessor turns pixels into levels"),
        (image > 0.5, "`.long()` makes them levels"),
    ]:
        for call in (model, model.log_prob):
            with pytest.raises(TypeError, match=re.escape(meant)):
                call(floats, class_ids=class_ids)
    for request, meant in [
        (lambda: generate(4), "To draw 4 images pass `num_images=4`."),
        (lambda: generate(seed=0), "For `seed` pass `generator=torch.Generator().manual_seed(seed)`."),
        (lambda: generate(num_return_sequences=4), "For `num_return_sequences` pass `num_images`."),
        (lambda: generate(batch_size=4), "pass `num_images`, and to draw a few of them at a time `max_batch_size`."),
        (lambda: model((image * 255).long(), class_ids=class_ids), "PixelCNNImageProcessor turns pixels into levels."),
        (lambda: generate(class_labels=[1]), "For `class_labels` pass `class_ids`."),
        (lambda: generate(tempreature=2), "For `tempreature` pass `temperature`."),
        (lambda: generate(num_image=2), "For `num_image` pass `num_images`."),
        (lambda: generate(beams=2), "Settings are ['do_sample', 'guidance_scale'"),
        (lambda: generate(class_ids="2"), "The class of that number is `class_ids=2`, without quotes."),
        (lambda: type(model.config)(num_levels=512), "take input_encoding='embedding'"),
    ]:
        with pytest.raises((ValueError, StrictDataclassError), match=re.escape(meant)):
            request()
    with pytest.raises(ValueError, match=r"no class '3'; the model has \['LABEL_0', 'LABEL_1', 'LABEL_2'\]\.$"):
        generate(class_ids="3")


def test_settings_of_generate_are_in_its_signature(family):
    parameters = inspect.signature(build_model(family).generate).parameters
    assert {"num_images", *PixelCNNGenerationConfig().to_dict()} - {"transformers_version"} <= set(parameters)
    assert parameters["temperature"].annotation == float | None
    assert "temperature: float | None = None" in pydoc.render_doc(FAMILIES[family].causal_class.generate)
