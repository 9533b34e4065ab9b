"""Command lines and recipes: what options there are, and that a mistake is told before torch is imported."""

import json
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import get_args, get_type_hints

import benchmark
import convert_pixelcnnpp_checkpoint
import judge
import outliers
import pytest
import receptive_field
import sample
import score
import train
import train_arguments
from command_line import CommandLineError, CommandLineParser, one_line_errors, options_of
from conftest import ROOT, for_each, one_line_error
from declared_fields import fields_of_configs, fields_of_script, fields_of_training_arguments
from huggingface_hub.errors import StrictDataclassError
from places import check_places

import hf_pixelcnn
from hf_pixelcnn.sampling_causal_image import SAMPLERS
from hf_pixelcnn.training import InputError, PixelCNNTrainingArguments

pytestmark = pytest.mark.versions


def is_enum(kind):
    return hasattr(kind, "__members__")


def test_fields_read_from_source_are_those_of_the_classes():
    declared, hints = fields_of_training_arguments(), get_type_hints(PixelCNNTrainingArguments)
    known = {item.name: item for item in fields(PixelCNNTrainingArguments) if item.init}
    assert known.keys() - declared.keys() <= {"parallelism_config"}  # not for a command line
    assert declared.keys() - known.keys() == set()
    for name, found in declared.items():
        kinds, theirs = (get_args(kind) or (kind,) for kind in (found.type, hints[name]))
        for kind in (bool, int, float, str, NoneType):
            assert (kind in kinds) == (kind in theirs), name
        enums = [kind for kind in theirs if is_enum(kind)]
        values = [value for kind in kinds for value in get_args(kind) if isinstance(value, str)]
        assert values == [item.value for kind in enums for item in kind], name
        if known[name].default is not MISSING and found.default is not None:
            assert found.default == known[name].default, name
    configs = fields_of_configs()
    assert configs.keys() == hf_pixelcnn.FAMILIES.keys()
    for model_type, family in hf_pixelcnn.FAMILIES.items():
        own = {item.name: item for item in family.config_class.own_fields()}
        assert {name: found.default for name, found in configs[model_type].items() if name in own} == {
            name: None if name == "format_version" else item.default  # no literal, and no option
            for name, item in own.items()
        }
        assert configs[model_type].keys() - own.keys() <= {"id2label", "label2id"}  # only for type checkers


def test_every_field_of_every_config_is_an_option_with_its_type_and_values():
    options = {name: (kind, option) for name, kind, option in train_arguments.config_options(set())}
    kinds = (train.ModelArguments, train.DataArguments)  # the last has `class_dropout`, which data sets need
    assert options.keys() <= {name for kind in kinds for name in kind.__dataclass_fields__}
    for family in hf_pixelcnn.FAMILIES.values():
        names = {config_field.name for config_field in family.config_class.own_fields()} - {"format_version"}
        assert names <= options.keys()
    kinds = {name: kind for name, (kind, _) in options.items()}
    assert kinds["weight_norm"] == bool | None
    assert kinds["hidden_size"] == kinds["num_logistic_mix"] == int | None
    assert kinds["dropout"] == float | None
    for family in hf_pixelcnn.FAMILIES.values():
        for item in family.config_class.own_fields():
            if item.type in (str, str | None):
                choices = options[item.name][1].metadata["choices"]
                with pytest.raises(StrictDataclassError) as error:
                    family.config_class(num_channels=1, **{item.name: "another"})
                assert all(f"'{choice}'" in str(error.value) for choice in choices), item.name
    assert "64 (gated_pixelcnn), 128 (pixelcnn), 160 (pixelcnn_pp)" in options["hidden_size"][1].metadata["help"]


def test_each_option_has_one_spelling_and_help_lists_the_common_ones():
    parser = train_arguments.make_parser()
    for action in parser._actions:
        assert len(action.option_strings) == 1 or action.dest == "help"
        assert "-" not in action.option_strings[-1].removeprefix("--")
    text = parser.format_help()
    for shown in (
        "--config FILE",
        "--learning_rate float",
        "{gated_pixelcnn,pixelcnn,",
        "{no,steps,epoch}",
    ):
        assert shown in text
    assert "--neftune_noise_alpha" not in text
    parser.on_demand = ()
    assert "--neftune_noise_alpha" in parser.format_help()


def without_none(kind):
    """`str` for `str | None`: an argument parser that was made before has put that into the fields."""
    return next(part for part in get_args(kind) if part is not NoneType) if isinstance(kind, UnionType) else kind


def test_options_of_scripts_read_from_source_are_those_of_their_classes():
    for script in (benchmark, convert_pixelcnnpp_checkpoint, judge, outliers, receptive_field, sample, score):
        (own,) = [
            value for name, value in vars(script).items() if name.endswith("Arguments") and isinstance(value, type)
        ]
        found = {item.name: item for item in fields(options_of(script.__file__))}
        assert found.keys() == {item.name for item in fields(own)}
        for item in fields(own):
            default = item.default if item.default_factory is MISSING else None
            assert without_none(found[item.name].type) == without_none(item.type), item.name
            assert found[item.name].default == default, item.name
            assert found[item.name].metadata.items() <= item.metadata.items()


@pytest.mark.slow
def test_a_mistake_is_told_before_torch_is_imported(tmp_path):
    code = (
        "import json, runpy, sys; sys.path.insert(0, 'training')\n"
        "for sys.argv in json.loads(sys.argv[1]):\n"
        "    try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    except SystemExit as error: print(error.code)\n"
        "    print('torch' in sys.modules)"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_levles: 4\n")
    cases = {
        ("train.py", "--sed", "1"): "error: unknown argument '--sed', the nearest is --seed; `--help_all` lists all.",
        ("score.py", "--modle", "x"): "error: unknown argument '--modle', the nearest is --model; `--help` lists all.",
        ("train.py", "--config", str(recipe)): "'num_levles' in {recipe}, the nearest is num_levels; keys are",
        (
            "compress.py",
            "verify",
            "--modle",
            "x",
        ): "error: unknown argument '--modle', the nearest is --model; `--help`",
        ("publish.py", "--model", "model_cards/pixelcnn-mist"): "no folder model_cards/pixelcnn-mist, the nearest is",
        ("sample.py", "--model", "x/y", "--sampler", "cashed"): "error: argument --sampler: invalid choice: 'cashed' (",
        ("demo.py", "--max_step", "3"): "error: unknown argument '--max_step', the nearest is --max_steps; `--help`",
        ("score.py", "--dataset", "mnist", "--model", "./runs/x"): "error: `model`: there is no folder ./runs/x.",
    }
    commands = json.dumps([[str(ROOT / "training" / script), *words] for script, *words in cases])
    finished = subprocess.run(
        [sys.executable, "-c", code, commands], capture_output=True, text=True, cwd=ROOT, check=True
    )
    told = finished.stdout.splitlines()
    for message, line, has_torch in zip(cases.values(), told[::2], told[1::2], strict=True):
        assert message.format(recipe=recipe) in line
        assert has_torch == "False"
    command = [sys.executable, str(ROOT / "training" / "score.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "\nScore a model on a whole split: " in shown
    assert "(default: None)" not in shown


def test_a_mistyped_folder_is_told_from_an_id_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits-gated" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "notes.txt").touch()
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays" / "images.npy").touch()
    for place in ("org/model", "runs/digits-gated", "./runs", str(tmp_path)):
        check_places({"model": place, "models": [place, "pixelrnn"], "dataset": place})
    check_places({"dataset": "mnist", "model": None, "seed": 3, "output": "no/such/file"})
    near = "the nearest is runs/digits-gated"
    for place, message in {
        "runs/digits": f"no folder runs/digits, {near} (as there is a folder runs here",
        "./runs/digits_gated": f"no folder ./runs/digits_gated, {near}.",
        "./rusn/digit-gated/run": f"{near}/run.",
        f"{tmp_path}/runs/digits": f"the nearest is {tmp_path}/runs/digits-gated.",
        "digits": "there is no folder digits.",
        "~/nowhere-at-all/x": "there is no folder ~/nowhere-at-all/x.",
        "a/b/c": "there is no folder a/b/c.",
        "runs/notes.txt": "must be the folder of a model or its id on the Hub, got the file runs/notes.txt, whose",
    }.items():
        for name in ("model", "background", "model_name_or_path", "models"):
            with pytest.raises(ValueError, match=re.escape(message)):
                check_places({name: [place] if name == "models" else place})
        if place != "digits":
            with pytest.raises(ValueError, match=re.escape(message.replace("of a model", "of a data set"))):
                check_places({"complete": place})
    for place in ("arrays", "arrays/images.npy"):
        with pytest.raises(ValueError, match=r"got arrays: arrays.*Save them .* or by `datasets\.Dataset\."):
            check_places({"dataset": place})
    with pytest.raises(ValueError, match=r"there is no folder or family pixelrn, the nearest is pixelrnn\."):
        check_places({"models": ["pixelrn"]})


@for_each("recipe", {path.name: path for path in sorted((ROOT / "training" / "configs").glob("*.yaml"))})
def test_each_recipe_is_understood_and_says_what_to_expect(recipe, tmp_path):
    # whether bf16 and compilation are there is a question of the machine
    words = ["--config", str(recipe), "--output_dir", str(tmp_path), "--bf16", "false", "--torch_compile", "false"]
    request = train_arguments.read_arguments(words)
    num_levels, num_channels = 2 if request.data.binarization else 256, 1 if "mnist" in request.data.dataset else 3
    names = None if request.model.generative_weight is None else ["cat", "dog"]
    if request.model.model_name_or_path is None:
        train.new_model(request.model, names, num_levels=num_levels, num_channels=num_channels, image_size=8)
    assert 1e-4 < train.training_arguments(request).learning_rate < 1e-2  # a number, not a word
    header = recipe.read_text()
    assert f"--config training/configs/{recipe.name}" in header
    for word in ("Hardware:", "Time:", "Score on"):
        assert word in header


def parse_recipe(folder, text, *words):
    (folder / "recipe.yaml").write_text(text)
    words = ["--config", str(folder / "recipe.yaml"), "--output_dir", str(folder / "run"), *words]
    return train_arguments.make_parser().parse(words)


def test_values_of_a_recipe_have_the_types_of_their_arguments(tmp_path):
    text = (
        "dataset: digits\nstreaming: true\ncenter_crop: 'no'\nnum_levels: '16'\nweight_norm: false\n"
        "generative_weight: 1\nlearning_rate: 1e-3\nwarmup_steps: 0.5\nseed: null\nlabel_names: [labels, names]\n"
        "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 6000, decay_type: 1-sqrt}\n"
        "include_for_metrics: loss\nreport_to: []\nsave_steps: 7\ndataloader_drop_last: false\nimage_size: [24, 32]\n"
        "max_steps: 5\n"
    )
    parse_recipe(tmp_path, text)
    words = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]
    request = train_arguments.read_arguments([*words, "--save_steps", "9", "--streaming", "false"])
    args = train.training_arguments(request)
    assert (request.data.dataset, request.data.streaming, request.data.center_crop) == ("digits", False, False)
    assert (request.model.num_levels, request.model.weight_norm, request.model.image_size) == (16, False, [24, 32])
    assert isinstance(request.model.generative_weight, float)
    assert (args.learning_rate, args.warmup_steps, args.seed, args.save_steps) == (1e-3, 0.5, 42, 9)
    assert (args.label_names, args.include_for_metrics, args.report_to) == (["labels", "names"], ["loss"], [])
    assert args.lr_scheduler_kwargs == {"num_decay_steps": 6000, "decay_type": "1-sqrt"}
    assert args.dataloader_drop_last is False


def test_a_value_of_another_type_in_a_recipe_is_refused_by_the_name_of_its_key(tmp_path):
    for line, message in {
        "num_levles: 4": "unknown key 'num_levles' in .*recipe.yaml, the nearest is num_levels; keys",
        "3: 4": "unknown key 3 in",
        "num_levels: many": "must be int, got 'many'",
        "num_levels: 2.5": "must be int, got 2.5",
        "num_levels: true": "must be int, got True",
        "num_levels: [2]": r"must be int, got \[2\]",
        "image_size: [24, wide]": r"must be list\[int\], got \[24, 'wide'\]",
        "learning_rate: fast": "must be float, got 'fast'",
        "learning_rate: true": "must be float, got True",
        "dataset: 3": r"must be str \(in quotes .*\), got 3",
        "bf16: 3": "must be bool, got 3",
        "bf16: maybe": "must be bool, got 'maybe'",
        "label_names: [3]": r"must be list\[str\], got \[3\]",
        "class_prior: [true]": r"must be list\[float \| str\], got \[True\]",
        "lr_scheduler_kwargs: [1]": r"must be dict or str .* got \[1\]",
        "eval_strategy: no": r"must be one of no, steps, epoch \(in quotes .*\), got False",
        "logging_strategy: no": r"must be one of no, steps, epoch \(in quotes .*\), got False",
        "logging_strategy: night": "must be one of no, steps, epoch .* got 'night'",
        "binarization: some": "must be one of threshold, stochastic .* got 'some'",
    }.items():
        expected = message if message.startswith("unknown") else f"`{line.split(':')[0]}` in .*recipe.yaml {message}"
        for words in ([], ["--num_levels", "4", "--learning_rate", "1", "--dataset", "digits"]):
            with pytest.raises(CommandLineError, match=expected):  # also where the command line would override it
                parse_recipe(tmp_path, f"{line}\n", *words)


def test_a_recipe_holds_no_token(tmp_path):
    with pytest.raises(CommandLineError, match=r"`hub_token` in .*: a recipe is kept and published"):
        parse_recipe(tmp_path, "hub_token: anything\n")


def test_a_message_does_not_obey_what_it_repeats():
    @one_line_errors
    def main(arguments=None):
        raise CommandLineError("there is no \x1b[31m\x07 \u202e folder\nmodèle")

    assert one_line_error(main, []) == r"error: there is no \x1b[31m\x07 \u202e folder modèle"


def test_a_recipe_gives_arguments_that_are_needed(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: me/here\nsplit: train\n")
    words = ["--dataset", "digits", f"--config={tmp_path / 'recipe.yaml'}"]
    (args,) = CommandLineParser(score.EvaluationArguments).parse(words)
    assert (args.model, args.dataset, args.split) == ("me/here", "digits", "train")
    with pytest.raises(CommandLineError, match="`--config` needs the path of a YAML file"):
        CommandLineParser(score.EvaluationArguments).parse(["--config", "--dataset", "digits"])


def test_a_field_goes_to_the_config_of_a_family_that_has_it():
    (arguments,) = CommandLineParser([train.ModelArguments]).parse(
        ["--model_type", "pixelcnn_pp", "--weight_norm", "false", "--hidden_size", "8", "--num_hidden_layers", "1"]
    )
    model = train.new_model(arguments, None)
    assert model.config.weight_norm is False
    assert not [name for name, _ in model.named_parameters() if name.endswith("gain")]
    arguments.model_type = "gated_pixelcnn"
    with pytest.raises(InputError, match="--weight_norm is for pixelcnn_pp, pixelsnail; a gated_pixelcnn has no such"):
        train.new_model(arguments, None)


def test_the_samplers_to_choose_from_are_those_of_the_package():
    assert fields_of_script(sample.__file__)["sampler"].metadata["choices"] == tuple(sorted(SAMPLERS))


def test_a_prior_of_classes_is_probabilities_or_a_word(tmp_path):
    def prior_of(*words, recipe=""):
        return train.fields_of_classifier(parse_recipe(tmp_path, recipe, *words)[1]).get("class_prior")

    assert prior_of() is None
    assert prior_of("--class_prior", "0.5", "0.3", "0.2") == [0.5, 0.3, 0.2]
    assert prior_of("--class_prior", "learned") == prior_of(recipe="class_prior: learned") == "learned"
    assert prior_of(recipe="class_prior: [0.5, 1e-1, .4]") == [0.5, 0.1, 0.4]
    for words in ("lerned", "0.5 half", "learned learned", "0.5 learned"):
        with pytest.raises(CommandLineError, match=f"must be the probability of each class .* `learned`, got {words}"):
            prior_of("--class_prior", *words.split())
    model = parse_recipe(tmp_path, "", "--generative_weight", "0", "--class_prior", "0.25", "0.75")[1]
    assert train.new_model(model, ["a", "b"]).config.class_prior == [0.25, 0.75]
    with pytest.raises(InputError, match=r"one probability for each of the 3 classes .*, got 2"):
        train.new_model(model, ["a", "b", "c"])


def test_a_new_classifier_has_no_dropout_unless_asked_for():
    words = ["--model_type", "pixelcnn_pp", "--output_distribution", "logistic_mixture", "--generative_weight", "0.5"]
    words += ["--hidden_size", "8", "--num_hidden_layers", "1"]
    for more, dropout in (([], 0.0), (["--dropout", "0.2"], 0.2)):
        (arguments,) = CommandLineParser([train.ModelArguments]).parse([*words, *more])
        assert train.new_model(arguments, ["a", "b"]).config.dropout == dropout
