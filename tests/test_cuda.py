"""The promises of the other tests, on a GPU."""

import pytest
import torch
from benchmark import noise_rule_violations
from conftest import SAMPLERS, VARIANTS, build_model, conditions, for_each, random_inputs, seeded

from hf_pixelcnn import CompressedStreamError, compress, decompress
from hf_pixelcnn.canvas_causal_image import draw_noise

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    """By default convolutions in float32 are computed in TF32, products of matrices are not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@for_each("variant", VARIANTS)
def test_all_samplers_draw_the_same_images_in_float64(family, variant, device):
    model = build_model(family, **variant).double().cuda()
    images = [
        model.generate(num_images=4, generator=seeded(0, device), sampler=sampler, **conditions(model, 4))
        for sampler in SAMPLERS
    ]
    assert images[0].device.type == "cuda"
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


@for_each("variant", VARIANTS)
def test_captured_steps_serve_later_requests(family, variant):
    model = build_model(family, **variant).double().cuda()

    def check(num_images, seed):
        request = {"num_images": num_images, **conditions(model, num_images)}
        cached, naive = (model.generate(**request, generator=seeded(seed), sampler=s) for s in ("cached", "naive"))
        assert torch.equal(cached, naive)

    for seed in range(3):
        check(3, seed)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
    model.cpu().cuda()  # elsewhere in memory
    check(3, seed=3)
    check(2, seed=3)
    check(3, seed=4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@for_each("variant", VARIANTS)
def test_lower_precision_obeys_the_noise_rule_within_its_tolerance(family, variant, dtype, tolerance):
    model = build_model(family, **variant).to("cuda", dtype)
    inputs = {name: tensor.cuda() for name, tensor in conditions(model, 3).items()}
    output = model.generate(
        num_images=3,
        generator=seeded(),
        output_scores=True,
        return_dict_in_generate=True,
        **inputs,
    )
    noise = draw_noise(seeded(), 3, len(output.scores), model.device)
    assert noise_rule_violations(model, output, noise, tolerance, **inputs) == 0


def test_a_cpu_generator_gives_both_devices_the_same_noise():
    on_cpu, on_gpu = (draw_noise(seeded(), 2, 30, torch.device(device)) for device in ("cpu", "cuda"))
    assert torch.equal(on_cpu, on_gpu.cpu())


@for_each("variant", VARIANTS)
def test_likelihoods_are_those_of_the_cpu(family, variant):
    model = build_model(family, **variant).double()
    inputs = random_inputs(model)
    expected = model.log_prob(**inputs)
    on_gpu = model.cuda().log_prob(**{name: tensor.cuda() for name, tensor in inputs.items()})
    torch.testing.assert_close(on_gpu.cpu(), expected)


def test_given_pixels_and_masks_may_lie_on_the_cpu(family):
    model = build_model(family).cuda()
    given = random_inputs(model)["pixel_values"]
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[:3] = True
    images = model.generate(pixel_values=given, known_mask=mask)
    assert torch.equal(images[:, :, :3].cpu(), given[:, :, :3])


def test_training_compiles(family):
    model = build_model(family, num_channels=3, num_levels=4).cuda().train()
    inputs = {name: tensor.cuda() for name, tensor in random_inputs(model).items()}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = torch.compile(model, fullgraph=True)(**inputs, labels=inputs["pixel_values"]).loss
    loss.backward()
    torch.testing.assert_close(loss, model(**inputs, labels=inputs["pixel_values"]).loss, rtol=0.05, atol=0.05)


@for_each("variant", VARIANTS)
def test_compressed_images_come_back_on_the_gpu_that_compressed_them(family, variant):
    model = build_model(family, **variant).cuda()
    inputs = random_inputs(model, batch=5)
    data = compress(model, inputs["pixel_values"].cuda(), inputs.get("class_ids"))
    assert torch.equal(decompress(model, data).cpu(), inputs["pixel_values"])
    with pytest.raises(CompressedStreamError, match="it was made on"):
        decompress(model.cpu(), data)
