"""A checkpoint of the PyTorch port of PixelCNN++ gives the same logits here as the port's network, written out."""

import pytest
import torch
import torch.nn.functional as F
from conftest import one_line_error, seeded
from convert_pixelcnnpp_checkpoint import convert_state_dict, main
from transformers import AutoModel

from hf_pixelcnn import PixelCNNImageProcessor, PixelCNNPPConfig, PixelCNNPPForCausalImageModeling

pytestmark = pytest.mark.slow

FEATURES, DEPTH, MIXTURES = 6, 2, 3


def port_state_dict(num_channels, dtype=torch.float64):
    """Random tensors under the port's names."""
    generator, state = seeded(), {}

    def layer(name, weight_shape, num_outputs):
        g_shape = (weight_shape[0], *[1] * (len(weight_shape) - 1))
        state[f"module.{name}.weight_v"] = torch.randn(weight_shape, generator=generator, dtype=dtype)
        state[f"module.{name}.weight_g"] = torch.rand(g_shape, generator=generator, dtype=dtype) + 0.5
        state[f"module.{name}.bias"] = torch.randn(num_outputs, generator=generator, dtype=dtype) * 0.2

    n = FEATURES
    layer("u_init.conv", (n, num_channels + 1, 2, 3), n)
    layer("ul_init.0.conv", (n, num_channels + 1, 1, 3), n)
    layer("ul_init.1.conv", (n, num_channels + 1, 2, 1), n)
    for way, depths, others in (("up", [DEPTH] * 3, (0, 1)), ("down", [DEPTH, DEPTH + 1, DEPTH + 1], (1, 2))):
        for i, depth in enumerate(depths):
            for j in range(depth):
                for stream, kernel, other in (("u", (2, 3), others[0]), ("ul", (2, 2), others[1])):
                    name = f"{way}_layers.{i}.{stream}_stream.{j}"
                    layer(f"{name}.conv_input.conv", (n, 2 * n, *kernel), n)
                    layer(f"{name}.conv_out.conv", (2 * n, 2 * n, *kernel), 2 * n)
                    if other:
                        layer(f"{name}.nin_skip.lin_a", (n, 2 * other * n), n)
    for i in range(2):
        for stream, kernel in (("u", (2, 3)), ("ul", (2, 2))):
            layer(f"downsize_{stream}_stream.{i}.conv", (n, n, *kernel), n)
            layer(f"upsize_{stream}_stream.{i}.deconv", (n, n, *kernel), n)
    num_outputs = MIXTURES * (10 if num_channels == 3 else 3)
    layer("nin_out.lin_a", (num_outputs, n), num_outputs)
    return state


def port_forward(state, pixels):
    """The port as a function: pixels in [-1, 1], `(batch, channels, h, w)`, to `(batch, h, w, parameters)`."""

    def tensors(name):
        v, g = state[f"module.{name}.weight_v"], state[f"module.{name}.weight_g"]
        norm = v.square().sum(dim=tuple(range(1, v.ndim)), keepdim=True).sqrt()  # inputs of a transposed convolution
        return g * v / norm, state[f"module.{name}.bias"]

    def u_conv(x, name, stride=1):  # rows above and this one, left and right
        return F.conv2d(F.pad(x, (1, 1, 1, 0)), *tensors(name), stride=stride)

    def ul_conv(x, name, stride=1):  # this pixel, left, above, above left
        return F.conv2d(F.pad(x, (1, 0, 1, 0)), *tensors(name), stride=stride)

    def celu(x):
        return F.elu(torch.cat([x, -x], dim=1))

    def nin(x, name):
        weight, bias = tensors(name)
        return torch.einsum("oc,bchw->bohw", weight, x) + bias[:, None, None]

    def res(z, conv, name, a=None):
        t = conv(celu(z), f"{name}.conv_input.conv")
        if a is not None:
            t = t + nin(celu(a), f"{name}.nin_skip.lin_a")
        value, gate = conv(celu(t), f"{name}.conv_out.conv").chunk(2, dim=1)
        return z + value * torch.sigmoid(gate)

    def moved_down(x):
        return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], dim=2)

    def moved_right(x):
        return torch.cat([torch.zeros_like(x[:, :, :, :1]), x[:, :, :, :-1]], dim=3)

    x = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
    us = [moved_down(u_conv(x, "u_init.conv"))]
    above = moved_down(F.conv2d(F.pad(x, (1, 1, 0, 0)), *tensors("ul_init.0.conv")))
    uls = [above + moved_right(F.conv2d(F.pad(x, (0, 0, 1, 0)), *tensors("ul_init.1.conv")))]
    for i in range(3):
        for j in range(DEPTH):
            us.append(res(us[-1], u_conv, f"up_layers.{i}.u_stream.{j}"))
            uls.append(res(uls[-1], ul_conv, f"up_layers.{i}.ul_stream.{j}", a=us[-1]))
        if i < 2:
            us.append(u_conv(us[-1], f"downsize_u_stream.{i}.conv", stride=2))
            uls.append(ul_conv(uls[-1], f"downsize_ul_stream.{i}.conv", stride=2))
    u, ul = us.pop(), uls.pop()
    for i in range(3):
        for j in range(DEPTH + (i > 0)):
            u = res(u, u_conv, f"down_layers.{i}.u_stream.{j}", a=us.pop())
            ul = res(ul, ul_conv, f"down_layers.{i}.ul_stream.{j}", a=torch.cat([u, uls.pop()], dim=1))
        if i < 2:
            u = F.conv_transpose2d(u, *tensors(f"upsize_u_stream.{i}.deconv"), stride=2, output_padding=1)
            u = u[:, :, :-1, 1:-1]
            ul = F.conv_transpose2d(ul, *tensors(f"upsize_ul_stream.{i}.deconv"), stride=2, output_padding=1)
            ul = ul[:, :, :-1, :-1]
    assert not us
    assert not uls
    return nin(F.elu(ul), "nin_out.lin_a").permute(0, 2, 3, 1)


def port_log_prob(parameters, levels):
    """Sum over channels of the log-likelihood of `(batch, channels, h, w)` levels, from the port's layout."""
    channels, x = levels.shape[1], levels.double() / 127.5 - 1
    logits = parameters[..., :MIXTURES]
    rest = parameters[..., MIXTURES:].unflatten(-1, (channels, -1))  # (b, h, w, channels, kinds * MIXTURES)
    log_mass = logits.log_softmax(-1)
    for c in range(channels):
        mean, log_scale, *_ = rest[..., c, :].split(MIXTURES, dim=-1)
        coefficients = [rest[..., k, 2 * MIXTURES :].tanh() for k in range(channels)]
        for k, other in {0: [], 1: [(0, 0)], 2: [(1, 0), (2, 1)]}[c]:
            mean = mean + coefficients[k] * x[:, other, ..., None]
        inverse = torch.exp(-log_scale.clamp(min=-7))
        above = torch.sigmoid((x[:, c, ..., None] + 1 / 255 - mean) * inverse)
        below = torch.sigmoid((x[:, c, ..., None] - 1 / 255 - mean) * inverse)
        above = torch.where(levels[:, c, ..., None] == 255, 1.0, above)
        below = torch.where(levels[:, c, ..., None] == 0, 0.0, below)
        log_mass = log_mass + (above - below).log()
    return torch.logsumexp(log_mass, dim=-1)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_converted_model_computes_what_the_port_does(num_channels):
    state = port_state_dict(num_channels)
    state["module.nin_out.lin_a.weight_g"] *= 0.3  # scales that are not tiny: the plain difference loses digits there
    fields, converted = convert_state_dict(state)
    assert fields["num_logistic_mix"] == MIXTURES
    assert fields["num_hidden_layers"] == DEPTH
    model = PixelCNNPPForCausalImageModeling(PixelCNNPPConfig(**fields)).double().eval()
    model.load_state_dict(converted)
    levels = torch.randint(256, (2, num_channels, 8, 12), generator=seeded())
    levels[0, :, :2] = 0
    levels[0, :, 2:4] = 255
    expected = port_forward(state, levels.double() / 127.5 - 1)
    logits = model(levels).logits
    torch.testing.assert_close(logits.sort(-1).values, expected.sort(-1).values)  # the same numbers in another order
    log_prob = model.log_prob(levels).sum(1)
    torch.testing.assert_close(log_prob, port_log_prob(expected, levels), rtol=1e-6, atol=1e-6)


def test_a_file_becomes_a_folder_that_loads_however_it_is_wrapped(tmp_path):
    state, weights = port_state_dict(3, torch.float32), []
    bare = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    kinds = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    parametrized = {
        f"_orig_mod.{layer}.{kinds.get(kind, kind)}": tensor
        for name, tensor in bare.items()
        for layer, _, kind in [name.rpartition(".")]
    }
    for number, file in enumerate((state, {"epoch": 3, "state_dict": bare}, {"model": parametrized})):
        torch.save(file, tmp_path / "port.pth")
        output = tmp_path / f"ours{number}"
        main(["--checkpoint", str(tmp_path / "port.pth"), "--output_dir", str(output), "--image_size", "8"])
        weights.append((output / "model.safetensors").read_bytes())
    assert len(set(weights)) == 1
    output.rename(tmp_path / "ours")
    words = ["--checkpoint", tmp_path / "port.pth", "--output_dir", tmp_path / "ours"]
    assert "exists already: choose a new or empty folder" in one_line_error(main, words)
    model = AutoModel.from_pretrained(tmp_path / "ours")
    assert type(model) is PixelCNNPPForCausalImageModeling
    assert model.generate(generator=seeded()).shape == (1, 3, 8, 8)
    processor = PixelCNNImageProcessor.from_pretrained(tmp_path / "ours")
    assert processor.num_levels == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("module.u_init.conv.weight_g"), "layer 'u_init.conv' has"),
        (lambda state: state.update({"module.attention.weight": torch.zeros(1)}), "a layer 'attention'"),
        (lambda state: state.clear(), "its first or last layer is missing"),
        (lambda state: state.update({"module.nin_out.lin_a.bias": torch.zeros(7)}), "has 7 outputs"),
        (lambda state: state.update({"module.u_init.conv.weight_g": torch.zeros(5)}), "shapes do not go together"),
        (lambda state: state["module.u_init.conv.bias"].fill_(torch.nan), "the model is broken: NaN"),
        (lambda state: state.update({"module.nin_out.lin_a.bias": torch.zeros(1).expand(10**9)}), "each stored once"),
        (
            lambda state: [state.pop(name) for name in list(state) if "down_layers.2.u_stream.1" in name],
            "is no complete PixelCNN",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_something_else_is_refused_in_one_line(tmp_path, change, message):
    state = port_state_dict(3, torch.float32)
    change(state)
    torch.save(state, tmp_path / "port.pth")
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(["--checkpoint", str(tmp_path / "port.pth"), "--output_dir", str(tmp_path / "ours")])


def test_a_pickle_is_not_run(tmp_path):
    (tmp_path / "port.pth").write_bytes(b"cos\nsystem\n(S'touch /tmp/ran'\ntR.")
    with pytest.raises(SystemExit, match="holds something besides tensors"):
        main(["--checkpoint", str(tmp_path / "port.pth"), "--output_dir", str(tmp_path / "ours")])
