"""What `publish.py` can be asked: its options, and which of them go together. Nothing here imports torch."""

from dataclasses import dataclass, field
from pathlib import Path

from command_line import CommandLineError, CommandLineParser
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from places import beside, no_folder


@dataclass
class FolderArguments:
    model: str | None = field(
        default=None, metadata={"help": "Folder of a trained model, as training/train.py leaves it."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder to write, or to write anew; by default `hub` in the model's folder."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Id on the Hub, or name, of the data set, if the run read a local copy of it."}
    )
    recipe: str | None = field(
        default=None, metadata={"help": "YAML recipe of the run; by default the model folder's recipe.yaml."}
    )
    quality: str | None = field(
        default=None, metadata={"help": "What the samples look like and where they fail, in words, for the card."}
    )
    license: str = field(default="apache-2.0", metadata={"help": "Licence of the weights, as the Hub spells it."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Weights above this size are split into files."})


@dataclass
class PublishArguments(FolderArguments):
    space: bool = field(default=False, metadata={"help": "Publish the page on the models in model_cards as a Space."})
    repo_id: str | None = field(default=None, metadata={"help": "Where to push: USER/NAME or ORGANISATION/NAME."})
    dry_run: bool = field(default=False, metadata={"help": "Write and check the folder, and push nothing."})
    private: bool = field(default=False, metadata={"help": "Make the repository a private one."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to; made if it does not exist."})
    commit_message: str | None = field(default=None, metadata={"help": "Title of the commit."})

    @property
    def is_pushed(self) -> bool:
        return self.repo_id is not None and not self.dry_run

    @property
    def repo_type(self) -> str:
        return "space" if self.space else "model"


def read_arguments(description: str, arguments: list[str] | None = None) -> PublishArguments:
    r"""
    Read and check the command line, whose help begins with a description.

    Raises:
        CommandLineError: If it cannot be used: an option is unknown or has an impossible value, or the model's folder
            is not there.
    """
    (args,) = CommandLineParser(PublishArguments, description=description).parse(arguments)
    if (args.model is None) != args.space:
        raise CommandLineError("give the folder of a model with --model, or --space true.")
    if args.model is not None and not (Path(args.model).is_dir() or beside(Path(args.model), "old").is_dir()):
        raise CommandLineError(f"--model: {no_folder(args.model)}")
    if args.repo_id is not None:
        try:
            validate_repo_id(args.repo_id)
        except HFValidationError as error:
            raise CommandLineError(f"--repo_id: {error}") from error
        if "/" not in args.repo_id:
            raise CommandLineError(f"--repo_id must be USER/{args.repo_id} or ORGANISATION/{args.repo_id}.")
    return args
