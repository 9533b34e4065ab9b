"""
The equations of the papers, written out once with the weights of saved files and nothing of the package: what it
computes is held to them. PixelCNN++ has the same in test_conversion.py.
"""

import torch
import torch.nn.functional as F
from conftest import ROOT, random_inputs
from safetensors.torch import load_file
from transformers import AutoModel


def saved_weights(name):
    """A published model in float64, and the tensors of its file."""
    folder = ROOT / "model_cards" / name
    tensors = load_file(folder / "model.safetensors")
    return AutoModel.from_pretrained(folder, dtype=torch.float64), {k: v.double() for k, v in tensors.items()}


def past_taps(kernel, sees_itself):
    """A k×k kernel without the taps on pixels that come later: rows below, the right half of the own row."""
    reach = kernel.shape[-1] // 2
    kernel = kernel.clone()
    kernel[:, :, reach + 1 :] = 0
    kernel[:, :, reach, reach + (1 if sees_itself else 0) :] = 0
    return kernel


def test_pixelcnn_is_section_3_of_the_paper():
    model, w = saved_weights("pixelcnn-mnist-binary")
    levels = random_inputs(model)["pixel_values"]

    def conv(x, name, **options):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    x = 2.0 * levels.double() - 1
    kernel = past_taps(w["model.conv_in.weight"], sees_itself=False)
    x = F.conv2d(x, kernel, w["model.conv_in.bias"], padding=kernel.shape[-1] // 2)
    for i in range(model.config.num_hidden_layers):
        block = f"model.layers.{i}"
        h = conv(x.relu(), f"{block}.conv_in").relu()
        h = F.conv2d(h, past_taps(w[f"{block}.conv.weight"], True), w[f"{block}.conv.bias"], padding=1).relu()
        x = x + conv(h, f"{block}.conv_out")
    for i in range(model.config.num_head_layers + 1):
        x = conv(x.relu(), f"head.layers.{i}")
    torch.testing.assert_close(model(levels).logits, x, rtol=0, atol=1e-10)
    log_prob = -F.binary_cross_entropy_with_logits(x, levels.double(), reduction="none")
    torch.testing.assert_close(model.log_prob(levels), log_prob, rtol=0, atol=1e-10)


def test_gated_pixelcnn_is_section_2_of_the_paper():
    model, w = saved_weights("gated-pixelcnn-mnist-binary")
    levels, classes = random_inputs(model, batch=3).values()

    def gate(x):
        value, gate = x.chunk(2, dim=1)
        return value.tanh() * gate.sigmoid()

    v = h = 2.0 * levels.double() - 1
    for i in range(model.config.num_hidden_layers):
        layer = f"model.layers.{i}"
        reach = (model.config.kernel_size if i else model.config.first_kernel_size) // 2
        e = w[f"{layer}.class_embedding.weight"][classes] * (classes >= 0)[:, None]  # -1: no class
        e = e[:, :, None, None]
        # The vertical stack: rows above, and after the first layer its own row, which knows only rows above.
        vertical = w[f"{layer}.vertical_conv.weight"]
        padded = F.pad(v, (reach, reach, reach, 0))
        vf = F.conv2d(padded if i else padded[:, :, :-1], vertical, w[f"{layer}.vertical_conv.bias"])
        # The horizontal one: pixels to the left, and after the first layer the pixel itself.
        padded = F.pad(h, (reach, 0))
        horizontal = w[f"{layer}.horizontal_conv.weight"]
        hf = F.conv2d(padded if i else padded[..., :-1], horizontal, w[f"{layer}.horizontal_conv.bias"])
        hf = hf + F.conv2d(vf, w[f"{layer}.vertical_to_horizontal.weight"])
        out = F.conv2d(gate(hf + e), w[f"{layer}.horizontal_out.weight"], w[f"{layer}.horizontal_out.bias"])
        v, h = gate(vf + e), h + out if i else out
    for i in range(model.config.num_head_layers + 1):
        h = F.conv2d(h.relu(), w[f"head.layers.{i}.weight"], w[f"head.layers.{i}.bias"])
    torch.testing.assert_close(model(levels, class_ids=classes).logits, h, rtol=0, atol=1e-10)


def test_a_gate_with_one_sigmoid_is_the_gate_of_the_paper():
    value, gate = torch.randn(2, 100, dtype=torch.float64) * 3
    one_sigmoid = -(gate.sigmoid() - 2 * (2 * value).sigmoid() * gate.sigmoid())  # as the sampling cache has it
    torch.testing.assert_close(one_sigmoid, value.tanh() * gate.sigmoid(), rtol=0, atol=1e-15)
