"""`pipeline("unconditional-image-generation", model=...)`: images in one line."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline
from transformers.image_utils import load_image
from transformers.utils import logging
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_file

from .checks_causal_image import check_count, check_json_object, check_processor, drawing_network
from .configuration_causal_image import is_int
from .image_processing_causal_image import PixelCNNImageProcessor, check_output_type
from .pictures_causal_image import Pictures

ONE_OR_LISTED = (np.ndarray, torch.Tensor, Image.Image, list, tuple)

logger = logging.get_logger(f"transformers.{__name__}")  # where `transformers.logging.set_verbosity` reaches


def items_of(several: Any) -> Iterator:
    """What a generator or `Dataset` holds; one that is indexed need not say where a loop over it ends."""
    return (several[i] for i in range(len(several))) if hasattr(several, "__getitem__") else iter(several)


def are_requests(num_images: Any) -> bool:
    """Whether these are several requests: a list, a generator or a `Dataset`."""
    is_one = isinstance(num_images, str | dict) or getattr(num_images, "ndim", None) == 0
    return not is_one and (isinstance(num_images, Iterable) or hasattr(num_images, "__getitem__"))


def picture(image: Any) -> Any:
    """The picture that a path or URL names, or that a row of a data set has; anything else as it is."""
    if isinstance(image, dict):
        if "image" not in image:
            raise ValueError(f"Rows of `images` must have an image named 'image', got {sorted(image)}.")
        image = image["image"]
    if not isinstance(image, str | os.PathLike):
        return image
    if "://" in os.fspath(image):
        return load_image(os.fspath(image))
    with Image.open(image) as opened:
        opened.load()
        return opened


@dataclass
class PixelCNNPipelineOutput(ModelOutput):
    r"""
    A notebook shows it as a grid of its images.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` of shape `(n, height, width, channels)` or `torch.Tensor` of shape
            `(n, channels, height, width)`): The images, 8 bits per channel.
        effective_sample_size (`torch.DoubleTensor` of shape `(n,)`, *optional*, returned with `num_resamples`): See
            [`PixelCNNGenerateOutput`].
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor | None = None
    effective_sample_size: torch.Tensor | None = None

    def _repr_png_(self) -> bytes | None:
        images = self.images
        if isinstance(images, torch.Tensor):
            images = images.movedim(1, -1).cpu().numpy()
        if isinstance(images, np.ndarray):
            images = [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images]
        return Pictures(images or [])._repr_png_()


class PixelCNNImagePipeline(Pipeline):
    r"""
    Draws images, or completes given ones.

    ```python
    >>> pipe = pipeline("unconditional-image-generation", model="model_cards/pixelcnn-pp-mnist")
    >>> pipe(class_ids="7", num_images=16).images[0].save("seven.png")
    ```

    If no image processor is saved with the model, one is built from its config, with a warning. One that makes another
    number of levels or channels than the model has is a `ValueError`.
    """

    model: Any  # its class may be a copy of ours that came with the checkpoint
    image_processor: PixelCNNImageProcessor

    _load_image_processor = None  # if that fails, see `__init__`
    _load_processor = False
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_video_processor = False

    def __init__(self, model, *args, image_processor=None, **kwargs):
        drawing_network(model)  # there must be one
        image_processor = image_processor or self.find_image_processor(model)
        check_processor(image_processor, model.config)
        super().__init__(model, *args, image_processor=image_processor, **kwargs)

    @staticmethod
    def find_image_processor(model) -> PixelCNNImageProcessor:
        """The image processor saved with a model, or else the one that its config describes."""
        config, name = model.config, model.name_or_path
        path = name and cached_file(
            name,
            "preprocessor_config.json",
            local_files_only=True,  # what is there has just been asked for
            revision=getattr(config, "_commit_hash", None),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path:
            check_json_object(path)
            return PixelCNNImageProcessor.from_pretrained(os.path.dirname(path))
        logger.warning(
            f"{name or 'The model'} has no image processor (preprocessor_config.json). Using one for "
            f"{config.num_levels} levels of equal width and {config.num_channels} channel(s), as the config says; "
            "whether the model was trained on such levels is not known."
        )
        return PixelCNNImageProcessor(num_levels=config.num_levels, num_channels=config.num_channels)

    def __call__(
        self,
        num_images: int | Iterable[int | dict] | None = None,
        *,
        class_ids: Any = None,
        images: Any = None,
        known_mask: torch.Tensor | np.ndarray | Image.Image | str | os.PathLike | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **generate_kwargs,
    ) -> PixelCNNPipelineOutput | tuple | list | Iterator:
        r"""
        Args:
            num_images (`int`, or several requests, *optional*):
                Images to draw; by default as many as the other arguments say, else `batch_size`, else one, of a
                conditional model one of each class. Or a list of requests, each a number or a dictionary of arguments,
                which win over those of the call: the outputs are a list. Those of a generator or a `Dataset` of
                requests come one by one, as they are asked for.
            class_ids (`int`, `str` or a list of them, *optional*):
                Classes by number or by their name in `config.id2label`, for conditional models; by default all classes
                in turn, unless images are to be completed.
            images (an image, or a list, generator or `Dataset` of them, *optional*):
                Images to complete: what the image processor takes, paths and URLs.
            known_mask (bool, `(height, width)` or broadcastable to `(n, channels, height, width)`, or a picture, its
                path or URL, *optional*): Where they are kept: True, or at least half white. The other way round than
                `mask_image` of diffusers, where white is what is painted anew.
            batch_size (`int`, *optional*): The most images drawn at a time; does not change them.
            generator, generate_kwargs: As for `generate`, e.g. `guidance_scale`, `num_resamples` or `temperature`.
            seed (`int`, *optional*): Instead of `generator`, one on the CPU with this seed.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`.
            return_dict (`bool`, defaults to `True`): `False` returns a tuple.

        Returns:
            [`PixelCNNPipelineOutput`] with `images` and, with `num_resamples`, `effective_sample_size`.

        Raises:
            ValueError: If a class name does not exist, or as `generate`.
        """
        if seed is not None:
            if generator is not None:
                raise ValueError("`seed` and `generator` both say where random numbers come from: give one of them.")
            if not is_int(seed) or not -(2**63) <= seed < 2**64:
                raise ValueError(f"`seed` must be an int of 64 bits, got {seed!r}.")
            generator = torch.Generator().manual_seed(seed)
        check_output_type(output_type)
        if are_requests(num_images):
            given = {"class_ids": class_ids, "images": images, "known_mask": known_mask, "batch_size": batch_size}
            given |= {"generator": generator, "output_type": output_type, "return_dict": return_dict, **generate_kwargs}
            return self.answers(cast(Iterable, num_images), given)
        request = {
            "num_images": num_images,
            "class_ids": class_ids,
            "images": images,
            "known_mask": known_mask,
            "generator": generator,
            "max_batch_size": self._batch_size if batch_size is None else batch_size,
        }
        inputs = self.preprocess(self.with_count_and_classes(request))
        outputs = cast(dict, self.forward(inputs, **{**self._forward_params, **generate_kwargs}))
        output = PixelCNNPipelineOutput(
            images=self.postprocess(outputs, output_type=output_type),
            effective_sample_size=outputs.get("effective_sample_size"),
        )
        return output if return_dict else output.to_tuple()

    def with_count_and_classes(self, request: dict) -> dict:
        """A request with how many images it is for, and of which classes, where nothing in it says so."""
        num_classes, generator = self.model.config.num_classes, request["generator"]
        num_images = request["num_images"]
        if num_images is not None:
            check_count("num_images", num_images)
        says_nothing = all(request[name] is None for name in ("num_images", "class_ids", "images"))
        if says_nothing and not isinstance(generator, list):
            num_images = request["max_batch_size"] or max(num_classes, 1)
        class_ids = request["class_ids"]
        if num_classes and class_ids is None and request["images"] is None:
            count = len(generator) if isinstance(generator, list) else num_images
            class_ids = [i % num_classes for i in range(cast(int, count))]
        return {**request, "num_images": num_images, "class_ids": class_ids}

    def answers(self, requests: Iterable[int | dict], given: dict) -> list | Iterator:
        """The output for each of several requests, with the arguments that are the same for all."""
        outputs = (
            self(**{**given, **(one if isinstance(one, dict) else {"num_images": one})}) for one in items_of(requests)
        )
        return list(outputs) if isinstance(requests, list | tuple) else outputs

    @staticmethod
    def loaded(images: Any) -> Any:
        """What the image processor takes: a generator or `Dataset` as a list, its rows' images, files as pictures."""
        if isinstance(images, str | os.PathLike | dict):
            images = [images]
        elif not isinstance(images, ONE_OR_LISTED):
            images = list(items_of(images))
        if not isinstance(images, list | tuple):
            return images
        return [picture(image) for image in images]

    def _sanitize_parameters(self, **kwargs):
        return {}, kwargs, {}

    def preprocess(self, inputs: dict) -> dict:
        """Images to levels; files to pictures."""
        request = {name: value for name, value in inputs.items() if value is not None}
        if "images" in request:
            images = self.loaded(request.pop("images"))
            request["pixel_values"] = self.image_processor(images, return_tensors="pt")["pixel_values"]
        if "known_mask" in request:
            request["known_mask"] = picture(request["known_mask"])
        return request

    def _forward(self, inputs: dict, **generate_kwargs) -> dict:
        output = self.model.generate(**{**inputs, **generate_kwargs, "return_dict_in_generate": True})
        return {"levels": output.sequences, "effective_sample_size": output.effective_sample_size}

    def postprocess(self, outputs: dict, output_type: str = "pil"):
        return self.image_processor.post_process(outputs["levels"], output_type=output_type)


__all__ = ["PixelCNNImagePipeline", "PixelCNNPipelineOutput"]
