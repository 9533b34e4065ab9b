"""PixelRNN: its equations, the backward pass of its scan, its variants, and what each of them sees."""

import pytest
import test_causality
import test_sampling
import torch
import torch.nn.functional as F
from conftest import VARIANTS, build_model, for_each, random_inputs
from huggingface_hub.errors import StrictDataclassError
from test_sampling import recordings  # noqa: F401 - a fixture

from hf_pixelcnn import PixelRNNConfig, PixelRNNForCausalImageModeling, compress, decompress, receptive_field
from hf_pixelcnn.recurrence_pixelrnn import lstm_scan, scan_by_autograd

SIZES = [(4, 5), (5, 3), (1, 4), (4, 1), (1, 1)]
COLOUR = VARIANTS["colour_bernoulli_classes"]
# The tests of all families run on the mended Diagonal BiLSTM. What they ask of one model is asked of the others here.
OTHERS = {"row_lstm": {**COLOUR, "recurrence": "row_lstm"}, "blind_spot": {**COLOUR, "has_blind_spot": True}}
check_the_past = test_causality.test_nothing_but_the_past_is_seen.__wrapped__
check_the_field = test_causality.test_all_of_the_receptive_field_is_seen.__wrapped__
check_samplers = test_sampling.test_all_samplers_draw_the_same_images_in_float64.__wrapped__
check_recordings = test_sampling.test_steps_can_be_recorded_and_replayed.__wrapped__


def scan_inputs(height, width, diagonal, features=3, seed=0):
    """Inputs and weight in float64; the Diagonal LSTM in two directions, as it is used."""
    generator = torch.Generator().manual_seed(seed)
    directions, taps = (2, 2) if diagonal else (1, 3)
    shapes = (directions, 2, height, width, 4 * features), (directions, 4 * features, taps * features)
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]


def cell(s, c):
    o, f, i, g = s.chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def row_lstm(s, w):
    """States `(batch, h, w, features)` pixel by pixel, from inputs and the taps left above, above, right above."""
    h, c = {}, {}
    zeros = torch.zeros_like(s[:, 0, 0, : s.shape[-1] // 4])
    for i in range(s.shape[1]):
        for j in range(s.shape[2]):
            above = [h.get((i - 1, j + d), zeros) for d in (-1, 0, 1)]
            gates = s[:, i, j] + torch.cat(above, dim=-1) @ w.T
            h[i, j], c[i, j] = cell(gates, c.get((i - 1, j), zeros))
    return torch.stack([torch.stack([h[i, j] for j in range(s.shape[2])], 1) for i in range(s.shape[1])], 1)


def diagonal_lstm(s, w):
    """The same for states above and to the left."""
    h, c = {}, {}
    zeros = torch.zeros_like(s[:, 0, 0, : s.shape[-1] // 4])
    for i in range(s.shape[1]):
        for j in range(s.shape[2]):
            read = torch.cat((h.get((i - 1, j), zeros), h.get((i, j - 1), zeros)), dim=-1)
            h[i, j], c[i, j] = cell(s[:, i, j] + read @ w.T, c.get((i, j - 1), zeros))
    return torch.stack([torch.stack([h[i, j] for j in range(s.shape[2])], 1) for i in range(s.shape[1])], 1)


def test_the_scan_is_the_recurrence_and_its_gradients_are_those_of_autograd():
    for diagonal in (True, False):
        for height, width in SIZES:
            s, w = inputs = scan_inputs(height, width, diagonal)
            by_pixel = torch.stack(
                [(diagonal_lstm if diagonal else row_lstm)(*both) for both in zip(s, w, strict=True)]
            )
            gradient = torch.randn(by_pixel.shape, dtype=torch.float64)
            expected = torch.autograd.grad(by_pixel, inputs, gradient)
            for scan in (lstm_scan, scan_by_autograd):
                states = scan(s, w, diagonal)
                torch.testing.assert_close(states, by_pixel, rtol=0, atol=1e-14)
                found = torch.autograd.grad(states, inputs, gradient)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
        s, w = scan_inputs(3, 2, diagonal, features=2)
        assert torch.autograd.gradcheck(lambda s, w, diagonal=diagonal: lstm_scan(s, w, diagonal), (s, w))


@for_each("recurrence", ("row_lstm", "diagonal_bilstm"))
def test_pixelrnn_is_section_3_of_the_paper(recurrence):
    model = build_model("pixelrnn", recurrence=recurrence, num_classes=3).double()
    levels, classes = random_inputs(model, batch=3).values()
    w = dict(model.named_parameters())

    def conv(x, name):
        return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def taps(name):
        weight = w[f"{name}.recurrence.weight"].flatten(2)  # (gates of each direction, features, taps)
        return torch.cat(weight.unbind(2), dim=1)

    def states(run, s, weight):
        return run(s.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)

    kernel = w["model.conv_in.weight"].clone()
    reach = kernel.shape[-1] // 2
    kernel[:, :, reach + 1 :], kernel[:, :, reach, reach:] = 0, 0
    image = 2.0 * levels.double() - 1
    x = F.conv2d(image, kernel, w["model.conv_in.bias"], padding=reach)
    for i in range(model.config.num_hidden_layers):
        layer = f"model.layers.{i}"
        e = (w[f"{layer}.class_embedding.weight"][classes] * (classes >= 0)[:, None])[:, :, None, None]
        if recurrence == "row_lstm":
            s = F.conv2d(F.pad(x, (1, 0)), w[f"{layer}.input_to_state.weight"], w[f"{layer}.input_to_state.bias"])
            x = x + conv(states(row_lstm, s + e, taps(layer)), f"{layer}.upsampling")
            continue
        e, e_right = e.chunk(2, dim=1)
        left_taps, right_taps = taps(layer).chunk(2)
        left = states(diagonal_lstm, conv(x, f"{layer}.left_input") + e, left_taps)
        s = conv(x, f"{layer}.right_input") + e_right + (conv(image, f"{layer}.image_input") if i == 0 else 0)
        right = states(diagonal_lstm, s.flip(3), right_taps).flip(3)
        right_above = torch.cat((torch.zeros_like(right[:, :, :1]), right[:, :, :-1]), dim=2)
        x = x + conv(left, f"{layer}.left_upsampling") + conv(right_above, f"{layer}.right_upsampling")
    for i in range(model.config.num_head_layers + 1):
        x = conv(x.relu(), f"head.layers.{i}")
    torch.testing.assert_close(model(levels, class_ids=classes).logits, x, rtol=0, atol=1e-12)


def test_the_sizes_of_the_paper():
    colour = {"num_channels": 3, "num_levels": 256, "output_distribution": "logistic_mixture"}  # 100 outputs, not 768
    colour |= {"hidden_size": 256, "num_hidden_layers": 12, "head_hidden_size": 1024}
    for config, parameters in [
        ({"has_blind_spot": True}, 69_377),  # whose test score on binary MNIST is 79.20 nats
        ({}, 69_441),
        ({"recurrence": "row_lstm"}, 58_177),
        ({**colour, "has_blind_spot": True}, 9_231_104 - (768 - 100) * 1025),
        ({**colour, "recurrence": "row_lstm"}, 8_045_312 - (768 - 100) * 1025),
    ]:
        with torch.device("meta"):
            assert PixelRNNForCausalImageModeling(PixelRNNConfig(**config)).num_parameters() == parameters


@for_each("other", OTHERS)
def test_the_other_variants_keep_the_core_promises(other):
    check_samplers("pixelrnn", other)
    check_the_past("pixelrnn", other)
    check_the_field("pixelrnn", other)


@for_each("variant", VARIANTS)
def test_all_samplers_draw_the_same_images_with_a_row_lstm(variant):
    check_samplers("pixelrnn", {**variant, "recurrence": "row_lstm"})


@for_each("other", OTHERS)
def test_adapters_act_in_the_recurrence_of_the_other_variants(other):
    import test_adapters  # skips this test without peft

    test_adapters.test_all_samplers_see_the_adapters.__wrapped__("pixelrnn", other)


def test_the_row_lstm_is_recorded_coded_and_drawn_at_any_size(recordings, monkeypatch):  # noqa: F811
    pytest.importorskip("constriction")
    check_recordings("pixelrnn", OTHERS["row_lstm"], recordings, monkeypatch)
    monkeypatch.undo()
    for height, width in [*SIZES, (12, 3), (3, 12)]:
        model = build_model("pixelrnn", recurrence="row_lstm", num_channels=3, image_size=[height, width]).double()
        images = [
            model.generate(num_images=2, generator=torch.Generator().manual_seed(0), sampler=s)
            for s in ("naive", "cached")
        ]
        assert torch.equal(*images)
        assert torch.equal(decompress(model, compress(model, images[0])), images[0])


def test_the_row_lstm_sees_a_cone():
    depth, reach, row, column = 2, 2, 9, 8
    model = build_model("pixelrnn", recurrence="row_lstm", num_hidden_layers=depth, image_size=[12, 20])
    seen = {tuple(pixel) for pixel in receptive_field(model, row, column)[0].nonzero().tolist()}
    cone = {(row, column + s) for s in range(-reach - depth, 0)}
    for d in range(1, row + 1):
        cone |= {(row - d, column + s) for s in range(-d - reach - depth, d - 1 + reach + 1)}
    assert seen == {(r, c) for r, c in cone if 0 <= c < 20}


def test_the_published_diagonal_bilstm_has_a_blind_spot_of_one_pixel_whatever_its_depth():
    past = torch.arange(8 * 10).view(1, 8, 10) < 5 * 10 + 3
    for depth in (1, 2, 5):
        fields = [
            receptive_field(
                build_model("pixelrnn", has_blind_spot=blind, num_hidden_layers=depth, image_size=[8, 10]), 5, 3
            )
            for blind in (True, False)
        ]
        assert (past & ~fields[0])[0].nonzero().tolist() == [[4, 9]]  # the last pixel of the row above
        assert torch.equal(fields[1], past)


def test_forget_gates_begin_open_and_what_is_loaded_stays(tmp_path):
    for recurrence, names in [("row_lstm", ["input_to_state"]), ("diagonal_bilstm", ["left_input", "right_input"])]:
        sizes = {"num_channels": 3, "hidden_size": 36, "head_hidden_size": 36}  # with masks, which loading makes anew
        config = PixelRNNConfig(recurrence=recurrence, num_hidden_layers=2, **sizes)
        model = PixelRNNForCausalImageModeling(config)
        for layer in model.model.layers:
            for name in names:
                assert getattr(layer, name).bias.view(4, -1).mean(1).tolist() == [0, 1, 0, 0]
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path)
        loaded = PixelRNNForCausalImageModeling.from_pretrained(tmp_path)
        saved = model.masked_state_dict()
        assert all(torch.equal(weight, saved[name]) for name, weight in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"recurrence": "lstm"}, "`recurrence` must be 'diagonal_bilstm' or 'row_lstm', got 'lstm'"),
        ({"recurrence": "row_lstm", "has_blind_spot": True}, "`has_blind_spot` is about .*'diagonal_bilstm'"),
        ({"first_kernel_size": 4}, "`first_kernel_size` must be odd and at least 3, got 4"),
        ({"first_kernel_size": 1}, "`first_kernel_size` must be odd and at least 3, got 1"),
        ({"hidden_size": 31}, "`hidden_size` must be divisible by 2, .* got 31"),
        (
            {"num_channels": 3, "hidden_size": 33, "head_hidden_size": 33},
            r"divisible by 2 \* `num_channels` \(6\), .*split into one group per channel, got 33",
        ),
        ({"num_channels": 3, "hidden_size": 32, "num_levels": 4}, "`hidden_size` must be divisible by `num_channels`"),
    ],
    ids=str,
)
def test_a_pixelrnn_that_cannot_be_is_refused_when_its_configuration_is_made(config, message):
    with pytest.raises(StrictDataclassError, match=message):
        PixelRNNConfig(**config)
