r"""
Publish a trained model: write the folder that goes to the Hub, check it, push it.

    python training/publish.py --model runs/mnist_pixelcnn --repo_id USER/pixelcnn-mnist-binary --dry_run true
    python training/publish.py --model runs/mnist_pixelcnn --repo_id USER/pixelcnn-mnist-binary

The folder (`--output_dir`, by default `<model>/hub`) holds weights, configs, the source files that make it work
without the package, `results.json`, `samples.png`, the recipe, and a model card made from these. It is loaded in a
fresh process that cannot import the package, and must give the same logits and draw the same image, bit for bit. Only
then is it pushed, in one commit, which also removes files of an earlier version; files that did not change are not
uploaded again. `--dry_run true` stops before the push, and so does a missing `--repo_id`, as for the folders in
`model_cards/`. If `--output_dir` is the model's own folder, as this script wrote it, code and card are brought up
to date (`make cards`). The token comes from `hf auth login` or HF_TOKEN.

    python training/publish.py --space true --output_dir runs/space --repo_id USER/pixel-by-pixel

writes, checks and pushes the folder of a Space instead: the page of `make app`, the package and all models in
`model_cards/`.
"""

import contextlib
import json
from pathlib import Path

from command_line import one_line_errors, what_to_do
from publish_arguments import PublishArguments, read_arguments

if __name__ == "__main__":
    one_line_errors(read_arguments)(__doc__)  # before the imports that take seconds: a typo is answered at once

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from published_folder import (
    check_folder,
    check_may_be_replaced,
    files_in,
    foreign_in_model,
    not_written,
    recover,
    write_folder,
    written_anew,
)
from space_folder import check_space, foreign_in_space, not_of_a_space, write_space

from hf_pixelcnn.training import InputError
from hf_pixelcnn.training.files import held


@contextlib.contextmanager
def hub_errors(repo_id: str):
    """Turn an error that the Hub answers into one line that says what to do."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise InputError("publishing needs a token: log in with `hf auth login`, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise InputError(f"the Hub does not accept the token ({error}); log in with `hf auth login`.") from error
        if status == 403:
            raise InputError(f"the token may not write to {repo_id}: it needs the role `write` ({error}).") from error
        raise InputError(f"{repo_id} was not published: {error}") from error


def check_repository_may_be_replaced(api: HfApi, args: PublishArguments, names: set[str]):
    """Raise if a repository holds files that this script did not write: all but the new ones would go."""

    def text(name: str) -> str:
        if name not in names:
            return ""
        path = api.hf_hub_download(args.repo_id, name, revision=args.revision, repo_type=args.repo_type)
        return Path(path).read_text(encoding="utf-8")

    if args.space:
        foreign = not_of_a_space(names, text("README.md"))
    else:
        foreign = not_written(names, text("README.md"), json.loads(text("config.json") or "{}"))
    if foreign:
        raise InputError(
            f"{args.repo_id} holds files that this script did not write, which would be replaced or deleted: "
            f"{', '.join(foreign)}. Choose another --repo_id, or delete them on the Hub first."
        )


def push_folder(folder: Path, args: PublishArguments) -> str:
    r"""
    Make the repository hold what `folder` holds, in one commit.

    Returns:
        `str`: URL of the commit; of the last one if nothing had changed.
    """
    api = HfApi()
    with hub_errors(args.repo_id):
        space_sdk = "gradio" if args.space else None
        kind = {"repo_type": args.repo_type}
        api.create_repo(args.repo_id, private=args.private or None, exist_ok=True, space_sdk=space_sdk, **kind)
        if args.private and not api.repo_info(args.repo_id, **kind).private:
            raise InputError(f"{args.repo_id} exists and is public: make it private on the Hub, or drop --private.")
        if args.revision:
            api.create_branch(args.repo_id, branch=args.revision, exist_ok=True, **kind)
        files = files_in(folder)
        held = set(api.list_repo_files(args.repo_id, revision=args.revision, **kind)) - {".gitattributes"}
        check_repository_may_be_replaced(api, args, held)
        gone = held - set(files)
        # Not `upload_folder`, which may split its work into several commits.
        commit = api.create_commit(
            args.repo_id,
            [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
            + [CommitOperationDelete(name) for name in sorted(gone)],
            commit_message=args.commit_message or f"Publish the {args.repo_type}",
            revision=args.revision,
            **kind,
        )
    return commit.commit_url


def publish_space(target: Path, args: PublishArguments):
    """Write the folder of a Space, check it, and push it if there is a repository to push it to."""
    recover(target)
    check_may_be_replaced(target, foreign_in_space)
    with written_anew(target) as folder:
        write_space(folder)
        check_space(folder)
    size = sum(path.stat().st_size for path in files_in(target).values())
    print(f"{target}: the folder of a Space, {size / 1e6:.1f} MB; `python app.py` in it starts the page")
    if args.is_pushed:
        print(f"published: {push_folder(target, args)}")


def publish_model(target: Path, args: PublishArguments):
    """Write the folder of a model, or write it anew, check it, and push it if there is a repository to push it to."""
    recover(target)
    check_may_be_replaced(target, foreign_in_model)
    with written_anew(target) as folder:
        model = write_folder(folder, args.repo_id or str(target), args.repo_id is not None, args)
        check_folder(folder, model)
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{target}: {len(list(target.iterdir()))} files, {size / 1e6:.1f} MB, works without the package")
    if args.is_pushed:
        print(f"published: {push_folder(target, args)}")


@one_line_errors
def main(arguments: list[str] | None = None):
    args = read_arguments(__doc__, arguments)
    if args.is_pushed:
        with hub_errors(args.repo_id):  # before any work
            HfApi().whoami()
    target = Path(args.output_dir or ("runs/space" if args.space else Path(args.model, "hub")))
    with held(target), what_to_do(lambda: f"{target} is as it was before, or new as a whole. Give the command again."):
        (publish_space if args.space else publish_model)(target, args)


if __name__ == "__main__":
    main()
