r"""
Turn a checkpoint of the widely used PyTorch port of PixelCNN++ into a model of this package.

    python training/convert_pixelcnnpp_checkpoint.py --checkpoint pcnn_lr.pth --output_dir pixelcnn-pp-cifar10

The file holds a state dict with weight-norm keys (`weight_g` and `weight_v`, or `parametrizations.weight.original0` and
`1`), alone or as the entry `state_dict`, `model_state_dict` or `model` of a dictionary, with or without the prefixes of
parallel and compiled models. It is read without running any code in it. The model gets plain weights: the port
normalises its transposed convolutions over their inputs, which a direction and a gain per output cannot express. Sizes
are read off the tensors. The folder must be new or empty.
"""

import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path

from command_line import CommandLineParser, check_first, one_line_errors

if __name__ == "__main__":
    check_first(__file__, __doc__)  # before the imports that take seconds: a typo is answered at once

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file

from hf_pixelcnn import PixelCNNImageProcessor, PixelCNNPPConfig, PixelCNNPPForCausalImageModeling
from hf_pixelcnn.training import InputError
from hf_pixelcnn.training.files import all_written_beside, held, is_new_or_empty
from hf_pixelcnn.training.saved_models import check_finite

# Names of layers in the port (regular expressions) and in this package.
LAYERS = {
    r"u_init\.conv": "model.vertical_in",
    r"ul_init\.0\.conv": "model.combined_in_above",
    r"ul_init\.1\.conv": "model.combined_in_left",
    r"(up|down)_layers\.(\d+)\.u_stream\.(\d+)\.conv_(input|out)\.conv": r"model.\1_layers.\2.\3.vertical.conv_\4",
    r"(up|down)_layers\.(\d+)\.ul_stream\.(\d+)\.conv_(input|out)\.conv": r"model.\1_layers.\2.\3.combined.conv_\4",
    r"(up|down)_layers\.(\d+)\.u_stream\.(\d+)\.nin_skip\.lin_a": r"model.\1_layers.\2.\3.vertical.conv_other",
    r"(up|down)_layers\.(\d+)\.ul_stream\.(\d+)\.nin_skip\.lin_a": r"model.\1_layers.\2.\3.combined.conv_other",
    r"downsize_u_stream\.(\d+)\.conv": r"model.vertical_downsampling.\1",
    r"downsize_ul_stream\.(\d+)\.conv": r"model.combined_downsampling.\1",
    r"upsize_u_stream\.(\d+)\.deconv": r"model.vertical_upsampling.\1",
    r"upsize_ul_stream\.(\d+)\.deconv": r"model.combined_upsampling.\1",
    r"nin_out\.lin_a": "head.layers.0",
}
WRAPPERS = ("state_dict", "model_state_dict", "model")  # entries under which checkpoints keep their state dict
PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")  # of parallel and compiled models
PARAMETRIZED = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


@dataclass
class ConversionArguments:
    checkpoint: str = field(metadata={"help": "File of the state dict, .pth or .safetensors."})
    output_dir: str = field(metadata={"help": "Folder to write model and image processor to."})
    image_size: int = field(default=32, metadata={"help": "Height and width of the images it was trained on."})


def our_name(layer: str) -> str:
    """The name in this package of a layer of the port."""
    for pattern, replacement in LAYERS.items():
        match = re.fullmatch(pattern, layer)
        if match:
            return match.expand(replacement).replace("conv_input", "conv_in")
    raise InputError(f"the checkpoint has a layer {layer!r}, which a PixelCNN++ of that port has not.")


def parts_of_layers(state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    r"""
    The tensors of each layer of the port: `bias`, and `weight` or `weight_g` and `weight_v`.

    Raises:
        InputError: If a layer has others, or their sizes contradict each other.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        name = PREFIXES.sub("", name)
        for theirs, ours in PARAMETRIZED.items():
            name = name.replace(theirs, ours)
        layer, _, kind = name.rpartition(".")
        if kind in layers.setdefault(layer, {}):
            raise InputError(f"the checkpoint has {name!r} twice, with and without a prefix.")
        layers[layer][kind] = tensor
    for layer, tensors in layers.items():
        our_name(layer)
        if set(tensors) not in ({"weight_g", "weight_v", "bias"}, {"weight", "bias"}):
            raise InputError(f"layer {layer!r} has {sorted(tensors)}, not weight_g, weight_v and bias.")
        weight = tensors.get("weight", tensors.get("weight_v"))
        fits = "weight_g" not in tensors or tensors["weight_g"].numel() == len(weight)
        if not fits or weight.ndim not in (2, 4) or tensors["bias"].ndim != 1:
            shapes = {kind: list(tensor.shape) for kind, tensor in tensors.items()}
            raise InputError(f"layer {layer!r} has tensors whose shapes do not go together: {shapes}.")
    return layers


def effective_weight(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """g · v / ‖v‖, the norm taken over all dimensions but the first, as the old weight norm does."""
    if "weight" in tensors:
        return tensors["weight"]
    g, v = tensors["weight_g"], tensors["weight_v"]
    return v * (g.flatten() / v.flatten(1).norm(dim=1)).view(-1, *[1] * (v.ndim - 1))


def head_rows(num_channels: int, num_components: int) -> torch.Tensor:
    """
    For each parameter of a pixel in this package, its place in the port: there come logits, then for each channel its
    means, log-scales and, in colour, one of the three sets of coefficients.
    """
    per_channel = 3 if num_channels == 3 else 2
    kinds = [0] + [1 + per_channel * c + kind for kind in range(per_channel) for c in range(num_channels)]
    return torch.cat([torch.arange(num_components) + kind * num_components for kind in kinds])


def count_components(converted: dict[str, torch.Tensor], num_channels: int) -> int:
    """Logistics of the mixture that the last layer gives."""
    num_outputs = len(converted["head.layers.0.bias"])
    num_components, rest = divmod(num_outputs, 10 if num_channels == 3 else 3)
    if rest or not num_components or len(converted["head.layers.0.weight"]) != num_outputs:
        raise InputError(f"the last layer has {num_outputs} outputs, which are not those of a mixture of logistics.")
    return num_components


def convert_state_dict(state: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    r"""
    Read the sizes off the tensors of the port, and give the tensors our names and layout.

    Args:
        state (`dict[str, torch.Tensor]`): The port's state dict.

    Returns:
        The fields of a [`PixelCNNPPConfig`], and the state dict of a [`PixelCNNPPForCausalImageModeling`], in the dtype
        of `state`.

    Raises:
        InputError: If they are not those of a PixelCNN++ of that port.
    """
    converted = {}
    for layer, tensors in parts_of_layers(state).items():
        name, weight = our_name(layer), effective_weight(tensors)
        if "upsampling" in name:
            weight = weight.transpose(0, 1)  # (in, out, rows, columns) in the port
        converted[f"{name}.weight"] = weight[:, :, None, None] if weight.ndim == 2 else weight
        converted[f"{name}.bias"] = tensors["bias"]

    missing = [name for name in ("model.vertical_in.weight", "head.layers.0.weight") if name not in converted]
    if missing:
        raise InputError("this is not a checkpoint of a PixelCNN++ of that port: its first or last layer is missing.")
    hidden_size, num_inputs = converted["model.vertical_in.weight"].shape[:2]
    num_channels = num_inputs - 1  # one more, which is 1 inside the image
    if num_channels not in (1, 3):
        raise InputError(f"the port knows images of 1 or 3 channels, the checkpoint has {num_channels}.")
    num_components = count_components(converted, num_channels)
    rows = head_rows(num_channels, num_components)
    for name in ("head.layers.0.weight", "head.layers.0.bias"):
        converted[name] = converted[name][rows]
    depths = {int(name.split(".")[3]) for name in converted if name.startswith("model.up_layers.")}
    if depths != set(range(len(depths))):
        raise InputError(f"the checkpoint has the blocks {sorted(depths)} of each resolution: some are missing.")
    config = {
        "num_channels": num_channels,
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(depths, default=0),
        "num_logistic_mix": num_components,
        "output_distribution": "logistic_mixture",
        "weight_norm": False,
    }
    return config, {name: tensor.contiguous() for name, tensor in converted.items()}


def is_state_dict(found: object) -> bool:
    """Whether something is a dictionary of tensors by name."""
    return isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    )


def read_tensors(path: str) -> dict[str, torch.Tensor]:
    r"""
    The tensors in a file, read without running code from it, in float64.

    Raises:
        InputError: If it holds no state dict of numbers.
    """
    try:
        if path.endswith(".safetensors"):
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} holds something besides tensors, which was not loaded.") from error
    except Exception as error:  # a foreign file may raise anything
        raise InputError(f"{path} cannot be read: {error}") from error
    if isinstance(found, dict) and not is_state_dict(found):
        found = next((found[name] for name in WRAPPERS if name in found), found)
    if not is_state_dict(found):
        raise InputError(f"{path} holds no state dict, names and tensors, alone or under {' or '.join(WRAPPERS)}.")
    for name, tensor in found.items():
        size = tensor.numel() * tensor.element_size()
        if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.untyped_storage().nbytes() < size:
            raise InputError(f"{path}: {name!r} is not a tensor of floating-point numbers, each stored once.")
    return {name: tensor.double() for name, tensor in found.items()}


def check_free(folder: Path):
    """Raise unless a folder is missing or empty."""
    if not is_new_or_empty(folder):
        raise InputError(f"{folder} exists already: choose a new or empty folder as --output_dir.")


@one_line_errors
def main(arguments: list[str] | None = None):
    (args,) = CommandLineParser(ConversionArguments).parse(arguments)
    output = Path(args.output_dir)
    with held(output):
        check_free(output)
        fields, state = convert_state_dict(read_tensors(args.checkpoint))
        size = {"height": args.image_size, "width": args.image_size}
        try:
            model = PixelCNNPPForCausalImageModeling(PixelCNNPPConfig(image_size=args.image_size, **fields))
            processor = PixelCNNImageProcessor(num_channels=fields["num_channels"], num_levels=256, size=size)
            model.load_state_dict(state)  # rounds to float32
        except (RuntimeError, ValueError, StrictDataclassError) as error:
            raise InputError(f"{args.checkpoint} is no complete PixelCNN++: {error}") from error
        check_finite(model)
        with all_written_beside(output) as beside:
            model.save_pretrained(beside)
            processor.save_pretrained(beside)
    print(f"{model.num_parameters():,} parameters: {fields}; model and image processor are in {args.output_dir}")


if __name__ == "__main__":
    main()
