"""What torch and accelerate make of a model: exported, mapped, wrapped and sharded ones compute the same."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import FAMILIES, build_model, random_inputs, seeded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

pytestmark = pytest.mark.versions


@pytest.mark.slow
def test_a_classifier_is_exported_with_a_dynamic_batch():
    model = build_model("gated_pixelcnn", num_levels=4, num_classes=2)
    classifier = FAMILIES["gated_pixelcnn"].classifier_class(model.config).eval()
    pixel_values = random_inputs(model)["pixel_values"]
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    inputs = {"pixel_values": pixel_values, "labels": torch.tensor([0, 1])}
    program = torch.export.export(classifier, (), inputs, dynamic_shapes={"pixel_values": batch, "labels": batch})
    more = {"pixel_values": random_inputs(model, batch=5)["pixel_values"], "labels": torch.tensor([0, 1, 1, 0, 1])}
    found, expected = program.module()(**more), classifier(**more)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)


def test_gradients_of_single_images_are_mapped(family):
    if not FAMILIES[family].promises("mapped_gradients"):
        pytest.skip(FAMILIES[family].lacks["mapped_gradients"])
    model = build_model(family, num_classes=3).double()
    pixel_values, class_ids = random_inputs(model).values()

    def loss(parameters, x, class_id):
        inputs = {"class_ids": class_id[None], "labels": x[None]}
        return torch.func.functional_call(model, parameters, (x[None],), inputs).loss

    parameters = dict(model.named_parameters())
    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, pixel_values, class_ids)
    for i in range(2):
        model.zero_grad()
        loss(parameters, pixel_values[i], class_ids[i]).backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(mapped[name][i], parameter.grad)


def test_a_model_out_of_accelerate_draws():
    expected = build_model("gated_pixelcnn").generate(generator=seeded())
    try:
        for precision in ("no", "bf16"):
            for keep_fp32_wrapper in (False, True):
                accelerator = Accelerator(cpu=True, mixed_precision=precision)
                prepared = accelerator.prepare(build_model("gated_pixelcnn"))
                model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep_fp32_wrapper)
                assert torch.equal(model.generate(generator=seeded()), expected)
                AcceleratorState._reset_state(True)
    finally:
        AcceleratorState._reset_state(True)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_model_scores_and_draws_or_says_how(family, mesh):
    model = build_model(family, num_levels=4, image_size=3)
    pixel_values = random_inputs(model)["pixel_values"]
    expected = model.log_prob(pixel_values), model.generate(generator=seeded())
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert torch.equal(model.log_prob(pixel_values), expected[0])
    with pytest.raises(ValueError, match=r"shared among processes.*use 'fixed_point'"):
        model.generate(generator=seeded())
    assert torch.equal(model.generate(generator=seeded(), sampler="fixed_point"), expected[1])
