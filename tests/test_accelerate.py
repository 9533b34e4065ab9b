"""Large models: `accelerate` loads them piece by piece and places them, masks and images stay right."""

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from conftest import build_model, conditions, for_each, random_inputs, seeded
from transformers import AutoModel

pytestmark = [pytest.mark.versions, pytest.mark.slow]


@pytest.fixture
def saved(family, tmp_path):
    model = build_model(family, num_channels=3, num_levels=4, num_classes=3)
    model.save_pretrained(tmp_path, max_shard_size=model.get_memory_footprint() // 4)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    return model, tmp_path


def assert_same_model(loaded, model):
    inputs = random_inputs(model)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    for name, mask in model.named_buffers():
        assert torch.equal(loaded.get_buffer(name), mask)
    images = [m.generate(generator=seeded(), **conditions(model, 2)) for m in (loaded, model)]
    assert torch.equal(*images)


@for_each("device_map", ["auto", {"": "cpu"}])
def test_an_empty_model_is_filled_and_dispatched(saved, device_map):
    model, folder = saved
    with init_empty_weights():
        empty = AutoModel.from_config(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    filled = load_checkpoint_and_dispatch(
        empty, folder, device_map=device_map, no_split_module_classes=model._no_split_modules
    )
    assert_same_model(filled.eval(), model)


def test_a_model_is_placed_automatically(saved):
    model, folder = saved
    loaded = AutoModel.from_pretrained(folder, device_map="auto")
    assert_same_model(loaded, model)


@for_each("is_first_on_disk", [False, True])
def test_layers_on_disk_give_the_same_likelihood(saved, is_first_on_disk):
    model, folder = saved
    device_map = {f"model.{name}": "cpu" for name, _ in model.model.named_children()}
    *_, (name, layers) = ((n, m) for n, m in model.model.named_children() if isinstance(m, torch.nn.ModuleList))
    del device_map[f"model.{name}"]
    device_map |= {f"model.{name}.{i}": "disk" if i else "cpu" for i in range(len(layers))}
    if is_first_on_disk:
        first = next(name for name, _ in model.named_parameters())
        places = {"cpu": "disk", "disk": "cpu"}
        device_map = {name: places[place] for name, place in device_map.items()}
        assert next(place for name, place in device_map.items() if first.startswith(f"{name}.")) == "disk"
    loaded = AutoModel.from_pretrained(
        folder, device_map={**device_map, "head": "disk"}, offload_folder=folder / "offload"
    )
    assert any(parameter.is_meta for parameter in loaded.parameters())
    assert (loaded.device.type == "meta") == is_first_on_disk
    inputs = random_inputs(model)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert torch.equal(loaded.log_prob(**inputs), model.log_prob(**inputs))
    request = {"image_size": (2, 3), **conditions(model, 1)}  # layers come from the disk for each value
    naive = [m.generate(generator=seeded(), sampler="naive", **request) for m in (loaded, model)]
    assert torch.equal(*naive)
    with pytest.raises(ValueError, match="some are offloaded"):
        loaded.generate(**conditions(model, 1))
