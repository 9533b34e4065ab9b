"""What `compress.py` can be asked: its commands and their options. Nothing here imports torch."""

from dataclasses import dataclass, field

from command_line import CommandLineParser

MAX_DIMS = 16_777_216  # that of `hf_pixelcnn.decompress`


@dataclass
class CompressArguments:
    """Compress an image file, or a folder of them, to one stream."""

    model: str = field(metadata={"help": "Folder or Hub id of a model with its image processor."})
    input: str = field(metadata={"help": "Image file, or folder of images of one size."})
    output: str = field(metadata={"help": "File to write, as in digits.pxc."})
    class_ids: list[str] | None = field(
        default=None,
        metadata={
            "help": "For a conditional model, classes by name or number: one of all images, or one of each, in the "
            "order of their files; by default none (-1)."
        },
    )
    verify: bool = field(default=False, metadata={"help": "Decompress and compare before writing."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; by default an accelerator if any."})


@dataclass
class VerifyArguments:
    """Decompress a stream, and say whether it is sound."""

    model: str = field(metadata={"help": "The model that compressed the images."})
    input: str = field(metadata={"help": "File that `compress` wrote."})
    max_dims: int = field(default=MAX_DIMS, metadata={"help": "Most dimensions, of all images, that a file may have."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; by default an accelerator if any."})


@dataclass(kw_only=True)
class DecompressArguments(VerifyArguments):
    """Write the images of a stream as PNG files."""

    output: str = field(metadata={"help": "PNG file for one image, or folder to make for all."})


@dataclass
class MeasureArguments:
    """Compare the compressed size of a data set with its likelihood, and the time with that of sampling."""

    model: str = field(metadata={"help": "Folder or Hub id of a model with its image processor."})
    dataset: str = field(metadata={"help": "Data set: an id on the Hub or a local folder."})
    split: str = field(default="test", metadata={"help": "Split or expression, e.g. test[:1000]."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where data sets are cached."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; by default an accelerator if any."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})


COMMANDS = {
    "compress": CompressArguments,
    "decompress": DecompressArguments,
    "verify": VerifyArguments,
    "measure": MeasureArguments,
}


def read_arguments(
    description: str | None, arguments: list[str] | None = None
) -> CompressArguments | DecompressArguments | VerifyArguments | MeasureArguments:
    r"""
    Read the command line.

    Args:
        description (`str`): What `--help` begins with.
        arguments (`list[str]`, *optional*): Words of the command line, `sys.argv[1:]` by default.

    Returns:
        The arguments of the command that was given.

    Raises:
        CommandLineError: If it cannot be used.
    """
    parser = CommandLineParser(description=description)
    commands = parser.add_subparsers(required=True)
    for name, kind in COMMANDS.items():
        command = commands.add_parser(name, dataclass_types=kind, help=kind.__doc__, description=kind.__doc__)
        command.set_defaults(command=name)
    (chosen,) = parser.parse(arguments)
    values = vars(chosen)
    return COMMANDS[values.pop("command")](**values)
