"""Models from a folder or the Hub, and the device to use them on."""

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the real class in every version
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME
from transformers.utils.hub import cached_file

from ..checks_causal_image import check_json_object, check_processor, some_of
from ..configuration_causal_image import CausalImageModelingConfig
from ..image_processing_causal_image import PixelCNNImageProcessor
from ..modeling_causal_image import CausalImagePreTrainedModel
from .errors import InputError

# What transformers raises for a folder that is damaged or somebody else's.
LOADING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    StrictDataclassError,
    SafetensorError,
)


def has_object(path: str, name: str) -> bool:
    """Whether a folder or repository has a JSON file; an `OSError` if that holds anything but names and values."""
    file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    if file is not None:
        check_json_object(file)
    return file is not None


def load_config(path: str) -> CausalImageModelingConfig:
    r"""
    The configuration of a saved model; no weights are read.

    Args:
        path (`str`): Folder, or id on the Hub.

    Raises:
        InputError: If it cannot be loaded, or is that of a model from elsewhere.
    """
    try:
        has_object(path, CONFIG_NAME)
        config = AutoConfig.from_pretrained(path)
    except LOADING_ERRORS as error:
        raise InputError(f"cannot load a model from {path!r}: {error}") from error
    if not isinstance(config, CausalImageModelingConfig):
        raise InputError(f"cannot load a model from {path!r}: a {config.model_type} is no model of this package.")
    if not isinstance(config.dtype, torch.dtype | None):
        raise InputError(f"cannot load a model from {path!r}: torch has no `dtype` {config.dtype!r}.")
    return config


def load_model(
    path: str, dtype: torch.dtype | str = torch.float32, **fields
) -> tuple[PreTrainedModel, PixelCNNImageProcessor | None]:
    r"""
    A saved model and its image processor, see [`load_processor`].

    Args:
        path (`str`): Folder, or id on the Hub.
        dtype (`torch.dtype`): Of the model; `"auto"`: the one it was saved in.
        fields: Take the place of those of its config; or other arguments of `from_pretrained`.

    Raises:
        InputError: If one of them cannot be loaded, the model has no head, or they differ in levels or channels.
    """
    load_config(path)
    try:
        model, report = AutoModel.from_pretrained(path, dtype=dtype, output_loading_info=True, **fields)
    except LOADING_ERRORS as error:
        raise InputError(f"cannot load a model from {path!r}: {error}") from error
    _check_head(path, report)
    return model, load_processor(path, model.config)


def _check_head(path: str, report: dict):
    """Raise if the head of a loaded model is not its file's: nobody trains it here, so it would stay random."""
    if any(name.startswith("head.") for name in report["missing_keys"]):
        raise InputError(f"{path!r} is a network without its head, so it has no likelihood and draws no images.")


def check_finite(model: CausalImagePreTrainedModel):
    r"""
    Refuse a model that training has broken.

    Raises:
        InputError: If a weight is NaN or infinite; the message names the tensors.
    """
    if broken := model.non_finite_weights():
        raise InputError(
            f"the model is broken: NaN or infinite numbers are in {len(broken)} of its tensors, {some_of(broken)}."
        )


def load_processor(path: str, config: CausalImageModelingConfig | None = None) -> PixelCNNImageProcessor | None:
    r"""
    The image processor of a saved model; `None` for a model of codes, which has none.

    Args:
        path (`str`): Folder, or id on the Hub.
        config ([`CausalImageModelingConfig`], *optional*): Of the model that it must belong to.

    Raises:
        InputError: If there is one but it cannot be loaded, or makes other levels than the model has.
    """
    try:
        if not has_object(path, IMAGE_PROCESSOR_NAME):
            return None
        processor = AutoImageProcessor.from_pretrained(path)
    except LOADING_ERRORS as error:
        raise InputError(f"cannot load the image processor of {path!r}: {error}") from error
    if config is not None:
        try:
            check_processor(processor, config)
        except ValueError as error:
            raise InputError(f"{path!r}: {error}") from error
    return processor


def load_classifier(path: str, **fields) -> PreTrainedModel:
    """A saved model as a classifier, in float32; `fields` replace those of its config."""
    load_config(path)
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **fields
        )
    except LOADING_ERRORS as error:
        raise InputError(f"cannot load a classifier from {path!r}: {error}") from error
    _check_head(path, report)
    return model


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; by default an accelerator if there is one, else the CPU."""
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used: {error}") from error
    if device.type == "meta":
        raise InputError("device 'meta' cannot be used: nothing is computed there.")
    return device
