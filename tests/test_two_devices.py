"""A model that accelerate has spread over two devices, as `device_map="auto"` does where there are two GPUs."""

import copy

import accelerate
import pytest
import torch
from conftest import FAMILIES, build_model, random_inputs, seeded
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from hf_pixelcnn import caching_causal_image

CPU = torch.device("cpu")
GET_DEVICE, SET_DATA = torch.Tensor.device.__get__, torch.Tensor.data.__set__
MAY_MIX = (torch.Tensor.to, torch.Tensor.copy_, SET_DATA, torch._has_compatible_shallow_copy_type)

pytestmark = pytest.mark.slow


class StandInDevices(TorchFunctionMode):
    """
    Other devices on a machine that has none: a tensor is where its attribute `place` says, what is made of it is there
    too, and operations refuse to mix places, as with real ones.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = args[:1] if func == torch.Tensor.__deepcopy__ else (args, kwargs)  # not what was copied before
        tensors = [x for x in tree_iter(given) if isinstance(x, torch.Tensor)]
        places = [getattr(x, "place", CPU) for x in tensors]
        if func == GET_DEVICE:
            return places[0]
        if len({place for x, place in zip(tensors, places, strict=True) if x.ndim}) > 1 and func not in MAY_MIX:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {places}.")
        place = next((place for place in places if place != CPU), CPU)
        if func == SET_DATA:
            args[0].place = places[1]
        elif func is torch.Tensor.to:
            args, kwargs, place = self.without_device(args, kwargs, places[0])
        elif func is torch.Tensor.copy_:
            place = places[0]
        elif kwargs.get("device") is not None:
            place = torch.device(kwargs.pop("device"))
        out = func(*args, **kwargs)
        if func is torch.Tensor.to and out is args[0] and place != places[0]:
            out = out.clone()
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor) and place != CPU:
                x.place = place
        return out

    @staticmethod
    def without_device(args, kwargs, place):
        """Arguments of `Tensor.to`, and where it moves the tensor."""
        devices = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.device | str)]
        rest = [x for x in args if not isinstance(x, torch.device | str)]
        kwargs = {name: x for name, x in kwargs.items() if name not in ("device", "non_blocking")}
        return rest if len(rest) > 1 or kwargs else [*rest, rest[0].dtype], kwargs, torch.device([place, *devices][-1])


def units(module, whole, name=""):
    """Names of the parts of a model that `device_map` may separate."""
    parts = list(module.named_children())
    if not parts or type(module).__name__ in whole or list(module.parameters(recurse=False)):
        return [name]
    return [unit for part, child in parts for unit in units(child, whole, f"{name}.{part}".strip("."))]


def spread(model):
    """The model with every other part on the other device."""
    model = copy.deepcopy(model)
    device_map = {unit: f"cuda:{i % 2}" for i, unit in enumerate(units(model, model._no_split_modules))}
    for unit, place in device_map.items():
        for tensor in (*model.get_submodule(unit).parameters(), *model.get_submodule(unit).buffers()):
            tensor.place = torch.device(place)
    return accelerate.dispatch_model(model, device_map=device_map, main_device="cuda:0", force_hooks=True)


CONFIGS = [
    {"num_channels": 3, "num_levels": 4},
    {"num_levels": 4, "output_distribution": "logistic_mixture", "input_encoding": "embedding"},
]


def everything(model, classifier, pixel_values, class_ids):
    """What a model and the classifier with its weights say of images, and what it draws."""
    inputs = {"pixel_values": pixel_values, "class_ids": class_ids}
    yield model(**inputs, labels=pixel_values).loss
    yield model(**inputs, labels=pixel_values, num_items_in_batch=torch.tensor(7)).loss
    yield model.log_prob(**inputs)
    yield classifier(pixel_values).logits
    yield classifier(pixel_values, labels=class_ids.clamp(min=0), num_items_in_batch=torch.tensor(7)).loss
    for sampler in ("cached", "fixed_point"):
        yield model.generate(num_images=2, class_ids=1, generator=seeded(), sampler=sampler)


def test_likelihoods_and_images_are_those_of_one_device(family, monkeypatch):
    monkeypatch.setattr(caching_causal_image, "CAPTURES", {})
    monkeypatch.setattr(accelerate.utils.modeling, "clear_device_cache", lambda: None)  # which takes most of the time
    for config in CONFIGS:
        if "output_distribution" not in config and not FAMILIES[family].promises("colour_without_mixture"):
            config = {**config, "output_distribution": "logistic_mixture"}
        model = build_model(family, num_classes=3, image_size=3, **config)
        classifier = FAMILIES[family].classifier_class(model.config).eval()
        classifier.load_state_dict(model.state_dict())
        inputs = random_inputs(model)
        expected = list(everything(model, classifier, **inputs))
        with StandInDevices():
            there = spread(model)
            assert {str(parameter.device) for parameter in there.parameters()} == {"cuda:0", "cuda:1"}
            for found, value in zip(everything(there, spread(classifier), **inputs), expected, strict=True):
                assert torch.equal(found.to("cpu"), value)


def test_the_stand_ins_do_not_mix():
    with StandInDevices():
        x = torch.ones(2)
        with pytest.raises(RuntimeError, match="on the same device"):
            _ = x.to("cuda:0") + x.to("cuda:1")
        with pytest.raises(RuntimeError, match="on the same device"):
            torch.cat((x, torch.zeros(2, device="cuda:1")))
        assert (x.to("cuda:1") * 2).device == torch.device("cuda:1")
