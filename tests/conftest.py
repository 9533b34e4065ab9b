import functools
import gc
import inspect
import io
import os
import sys
import zlib
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: no test needs the network
if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores, and compute what their children compute
    os.environ["OMP_NUM_THREADS"] = "1"

sys.path.append(str(Path(__file__).parent.parent / "training"))  # scripts, whose functions tests import

import pytest
import torch
from families import facts
from PIL import Image
from transformers.utils import logging

import hf_pixelcnn
from hf_pixelcnn.configuration_causal_image import MaskedKernelConfig

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "tests" / "data" / "mnist_digits")
FAMILIES = dict(hf_pixelcnn.FAMILIES)
WITH_KERNELS = [name for name, record in FAMILIES.items() if issubclass(record.config_class, MaskedKernelConfig)]
WITH_CHANNEL_GROUPS = [name for name, record in FAMILIES.items() if record.promises("colour_without_mixture")]
SAMPLERS = ("naive", "cached", "fixed_point")
# What a model can be, apart from its family: the tests of the core promises run over these.
VARIANTS = {
    "grey_bernoulli": {},
    "grey_categorical_classes": {"num_levels": 5, "num_classes": 3},
    "colour_categorical": {"num_channels": 3, "num_levels": 4},
    "colour_bernoulli_classes": {"num_channels": 3, "num_classes": 2},
    "grey_codes": {"num_levels": 7, "input_encoding": "embedding"},
    "grey_mixture_classes": {"num_levels": 6, "output_distribution": "logistic_mixture", "num_classes": 2},
    "colour_mixture": {"num_channels": 3, "num_levels": 9, "output_distribution": "logistic_mixture"},
    "colour_codes_wide_kernels": {"num_channels": 3, "input_encoding": "embedding", "kernel_size": 5},
}
# Between them: grey and colour, each distribution and each encoding, with classes and without.
KINDS = {name: VARIANTS[name] for name in ("grey_codes", "colour_bernoulli_classes", "colour_mixture")}


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="every fault, and attacks for ten minutes")


def pytest_collection_finish():
    """Spares the garbage collector, which training calls again and again, what the imports have made."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """What tests have measured and recorded as properties."""
    measured = [pair for report in terminalreporter.stats.get("passed", []) for pair in report.user_properties]
    if measured:
        terminalreporter.section("measured")
        for name, value in measured:
            terminalreporter.write_line(f"{name}: {value}")
        load, cores = os.getloadavg()[0], os.cpu_count()
        terminalreporter.write_line(
            f"load of the machine in the last minute, this run included: {load:.1f}, {cores} cores"
        )


def for_each(name, cases):
    """
    Calls a test with each of `cases` in turn as its argument `name`: one test, whose failure says of which case it is.
    What takes long is a parameter instead, which processes share. `cases` are by label, or label themselves.
    """
    labelled = cases if isinstance(cases, dict) else {str(case): case for case in cases}

    def decorate(test):
        @functools.wraps(test)
        def run(**fixtures):
            for label, case in labelled.items():
                try:
                    test(**fixtures, **{name: case})
                except BaseException as error:  # those of `pytest.fail` and `pytest.raises` are no `Exception`
                    error.add_note(f"{name}: {label}")
                    raise

        signature = inspect.signature(test)
        others = [parameter for parameter in signature.parameters.values() if parameter.name != name]
        run.__signature__ = signature.replace(parameters=others)  # what pytest looks for fixtures in
        return run

    return decorate


def small_config(family, **config):
    """Sizes for tests; those of kernels that a family lacks are left out."""
    defaults = {
        "image_size": [5, 6],
        "num_channels": 1,
        "num_levels": 2,
        "hidden_size": 12,
        "head_hidden_size": 6,
        "num_hidden_layers": 2,
        "first_kernel_size": 5,
        "num_logistic_mix": 3,
        "dropout": 0.0,
        **facts(family).SIZES,
        **config,
    }
    config_class = FAMILIES[family].config_class
    known = {field.name for field in config_class.own_fields()}
    missing = {name for name in defaults if name.endswith("kernel_size")} - known
    return config_class(**{name: value for name, value in defaults.items() if name not in missing})


def build_model(family, seed=0, **config):
    """A small model in evaluation mode, with weights large enough that levels are neither certain nor uniform."""
    torch.manual_seed(seed)
    model = FAMILIES[family].causal_class(small_config(family, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(facts(family).WEIGHT_SCALE).add_(0.05 * torch.randn_like(parameter))
        if model.config.output_distribution == "logistic_mixture":
            last = model.head.layers[-1]
            (last.weight if last.gain is None else last.gain).mul_(0.4)  # scales near 1: tiny ones magnify rounding
    return model.eval()


def classy_model(family, **config):
    """As `build_model` in float64, with classes that differ much: a fresh model has them almost alike."""
    return strengthen_classes(build_model(family, **config).double())


def strengthen_classes(model):
    for name, parameter in model.named_parameters():
        if "class_embedding" in name:
            parameter.data.mul_(20)
    return model


def random_inputs(model, batch=2, height=None, width=None, seed=0):
    """`pixel_values` and, for a conditional model, `class_ids` (with -1 among them)."""
    config = model.config
    shape = (batch, config.num_channels, height or config.image_size[0], width or config.image_size[1])
    pixel_values = torch.randint(config.num_levels, shape, generator=seeded(seed))
    return {"pixel_values": pixel_values, **conditions(model, batch)}


def conditions(model, batch):
    """`class_ids` for a conditional model, -1 among them; nothing for others."""
    return {"class_ids": torch.arange(batch) % (model.config.num_classes + 1) - 1} if model.config.num_classes else {}


def seeded(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def bomb() -> bytes:
    """A picture of 60000×60000 pixels in some bytes."""
    file = io.BytesIO()
    Image.new("L", (6, 6)).save(file, "png")
    data = bytearray(file.getvalue())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def one_line_error(main, words):
    with pytest.raises(SystemExit) as error:
        main([str(word) for word in words])
    message = error.value.code  # Python prints it to stderr and exits with code 1
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.fixture
def caplog(caplog):
    """As in pytest; also what transformers and this package log, which share their settings."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param
