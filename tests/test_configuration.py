import pytest
from conftest import FAMILIES, WITH_CHANNEL_GROUPS, WITH_KERNELS
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hf_pixelcnn import GatedPixelCNNConfig, PixelCNNConfig, PixelCNNForCausalImageModeling, PixelCNNPPConfig

pytestmark = pytest.mark.versions


def test_the_default_pixelcnn_has_307073_parameters():
    assert PixelCNNForCausalImageModeling(PixelCNNConfig()).num_parameters() == 307_073


def test_a_configuration_that_cannot_work_is_refused_when_it_is_made():
    cases = [
        (
            {"output_distribution": "bernoulli", "num_levels": 4, "num_channels": 1},
            "'bernoulli'` has two levels, but `num_levels` is 4",
        ),
        ({"output_distribution": "gaussian", "num_channels": 1}, "`output_distribution` must be .*got 'gaussian'"),
        ({"input_encoding": "onehot"}, "`input_encoding` must be 'scaled' or 'embedding', got 'onehot'"),
        ({"num_logistic_mix": 0}, "`num_logistic_mix` must be at least 1, got 0"),
        ({"num_levels": 1}, "`num_levels` must be between 2 and 256"),
        ({"num_levels": 257}, "`num_levels` must be between 2 and 256"),
        ({"num_levels": 16385, "input_encoding": "embedding"}, "`num_levels` must be between 2 and 16384"),
        ({"num_classes": 3, "id2label": {0: "a", 1: "b", 2: "a"}}, "a name of its own, but 2 are 'a'"),
        ({"num_channels": 0}, "`num_channels` must be at least 1, got 0"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1, got 0"),
        ({"num_head_layers": -1}, "`num_head_layers` must be at least 0, got -1"),
        ({"num_classes": -1}, "`num_classes` must be at least 0, got -1"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1.0"),
        ({"image_size": [28, 28, 1]}, "`image_size` must be a positive int or"),
        ({"image_size": 0}, "`image_size` must be a positive int or"),
        ({"num_classes": 3, "id2label": {0: "a", 1: "b"}}, "`id2label` must name each of the 3 classes"),
        ({"num_classes": 2, "id2label": {1: "a", 2: "b"}}, r"must number the classes 0 ... 1, got \[1, 2\]"),
        ({"hidden_size": "64"}, "hidden_size"),
    ]
    for config, message in cases:
        for family in FAMILIES.values():
            with pytest.raises(StrictDataclassError, match=message):
                family.config_class(**config)


def test_a_misspelt_field_gives_a_warning_unless_a_saved_config_brings_it(tmp_path, caplog):
    config = PixelCNNConfig(hidden_sizes=32, note="kept", num_labels=3, temperature=2.0, torch_dtype="float32")
    assert [record.getMessage() for record in caplog.records] == [
        "PixelCNNConfig has no field `hidden_sizes`: it has no effect. The nearest is `hidden_size`."
    ]
    assert (config.hidden_size, config.hidden_sizes, config.note) == (128, 32, "kept")
    config.save_pretrained(tmp_path)
    caplog.clear()
    config.num_chanels = 3
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert (again.num_chanels, again.hidden_sizes, again.note) == (3, 32, "kept")
    assert not hasattr(again, "_is_saved")
    assert not caplog.records


def test_kernels_and_channel_groups_that_cannot_work_are_refused():
    cases = [
        ({"kernel_size": 3.0}, "kernel_size"),
        ({"kernel_size": 4}, "`kernel_size` must be odd"),
        ({"first_kernel_size": 6}, "`first_kernel_size` must be odd"),
        ({"first_kernel_size": 1}, "`first_kernel_size` must be at least 3"),
        ({"num_channels": 3, "hidden_size": 64, "num_levels": 4}, "`hidden_size` must be divisible by"),
        ({"num_channels": 3, "hidden_size": 66, "head_hidden_size": 64}, "`head_hidden_size` must be divisible by"),
    ]
    for config, message in cases:
        for family in WITH_KERNELS:
            with pytest.raises(StrictDataclassError, match=message):
                FAMILIES[family].config_class(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"output_distribution": "categorical"},
            r"must be 'logistic_mixture' for .* got 'categorical' for 3",
        ),
    ],
    ids=str,
)
def test_what_pixelcnn_pp_cannot_be_is_refused(config, message):
    with pytest.raises(StrictDataclassError, match=message):
        PixelCNNPPConfig(**config)


@pytest.mark.parametrize("name", ["kernel_size", "first_kernel_size"])
def test_the_kernels_of_pixelcnn_pp_are_3_wide(name):
    assert not hasattr(PixelCNNPPConfig(**{name: 3}), name)  # as older configs say
    with pytest.raises(ValueError, match=rf"`{name}` of PixelCNN\+\+ is 3 and cannot be set, got 5"):
        PixelCNNPPConfig(**{name: 5})


def test_the_bottleneck_of_pixelcnn_asks_for_twice_as_many_features():
    with pytest.raises(StrictDataclassError, match=r"divisible by 2 \* `num_channels` \(6\).*got 129"):
        PixelCNNConfig(num_channels=3, hidden_size=129, head_hidden_size=129)
    GatedPixelCNNConfig(num_channels=3, hidden_size=129, head_hidden_size=129)


def test_with_a_mixture_features_are_not_split_by_channels():
    config = {"num_channels": 3, "num_levels": 256, "output_distribution": "logistic_mixture"}
    assert GatedPixelCNNConfig(**config, hidden_size=65, head_hidden_size=64).num_channel_groups == 1
    assert PixelCNNConfig(**config, hidden_size=64, head_hidden_size=65).num_channel_groups == 1
    with pytest.raises(StrictDataclassError, match=r"`hidden_size` must be divisible by 2, .*got 65"):
        PixelCNNConfig(**config, hidden_size=65)


def test_a_configuration_survives_its_file(family, tmp_path):
    config = FAMILIES[family].config_class(
        image_size=(8, 12), num_channels=3, num_levels=256, hidden_size=12, head_hidden_size=12, num_classes=4
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is FAMILIES[family].config_class
    a, b = ({k: v for k, v in c.to_diff_dict().items() if k != "transformers_version"} for c in (config, loaded))
    assert a == b
    assert loaded.image_size == [8, 12]
    assert loaded.output_distribution == ("categorical" if family in WITH_CHANNEL_GROUPS else "logistic_mixture")


def test_classes_set_their_names():
    assert PixelCNNConfig(num_classes=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert PixelCNNConfig(num_classes=2, id2label={0: "cat", 1: "dog"}).id2label == {0: "cat", 1: "dog"}


def test_names_and_numbers_of_classes_agree():
    assert PixelCNNConfig(num_classes=2, id2label={0: "cat", 1: "dog"}).label2id == {"cat": 0, "dog": 1}


def test_label2id_alone_names_the_classes():
    label2id, id2label = {"dog": 1, "cat": 0, "owl": 2}, {0: "cat", 1: "dog", 2: "owl"}
    saved = PixelCNNConfig(num_classes=3).to_dict()
    for config in (
        PixelCNNConfig(label2id=label2id),
        PixelCNNConfig(num_classes=3, label2id=label2id),
        PixelCNNConfig.from_dict(saved, label2id=label2id),
    ):
        assert config.num_classes == 3
        assert config.id2label == id2label
        assert config.label2id == label2id
    with pytest.raises(StrictDataclassError, match=r"must number the classes 0 ... 1, got \[1, 2\]"):
        PixelCNNConfig(label2id={"a": 1, "b": 2})


def test_labels_are_classes(family):
    config_class = FAMILIES[family].config_class
    for given in ({"num_labels": 5}, {"id2label": {i: str(i) for i in range(5)}}, {"num_classes": 5, "num_labels": 5}):
        config = config_class(**given)
        assert config.num_classes == config.num_labels == len(config.id2label) == len(config.label2id) == 5
    assert config_class(num_labels=2).num_classes == 2
    assert config_class(id2label={"0": "cat", "1": "dog"}).label2id == {"cat": 0, "dog": 1}
    assert config_class(num_labels=1).num_classes == 1
    assert config_class.from_dict({}, num_labels=3).num_classes == 3
    assert config_class.from_dict({}, id2label={0: "LABEL_0", 1: "LABEL_1"}).num_classes == 2


def test_numbers_of_classes_that_contradict_each_other(family):
    cases = [
        {"num_classes": 3, "num_labels": 5},
        {"num_labels": 3, "id2label": {0: "a", 1: "b"}},
        {"num_labels": 0, "id2label": {0: "a", 1: "b"}},
    ]
    message = r"classes contradict each other: `num_\w+` \d, `\w+` \d\. One of them"
    config_class = FAMILIES[family].config_class
    for given in cases:
        with pytest.raises(ValueError, match=message):
            config_class(**given)
        with pytest.raises(ValueError, match=message):
            config_class.from_dict({"num_classes": 4}, **given)
    with pytest.raises(ValueError, match="contradict each other: `num_classes` 0, `num_labels` 5"):
        config_class.from_dict({"num_classes": 4}, num_classes=0, num_labels=5)
    with pytest.raises(ValueError, match="`id2label` and `label2id` contradict each other"):
        config_class.from_dict({}, id2label={0: "a", 1: "b"}, label2id={"a": 1, "b": 0})
    for wrong in (-1, "5", 2.0):
        with pytest.raises(ValueError, match="`num_labels` must be an int of at least 0"):
            config_class(num_labels=wrong)


def test_a_model_without_classes_stays_one(family, tmp_path):
    """transformers calls two classes its own in every config; some were saved with them, or with names of no class."""
    config_class = FAMILIES[family].config_class
    names = {"0": "LABEL_0", "1": "LABEL_1"}
    config = config_class()
    for loaded in (
        config_class(**config.to_dict()),
        config_class.from_dict(config.to_dict()),
        config_class.from_dict(config.to_dict(), image_size=9),
        config_class.from_dict({"num_classes": 0, "id2label": names, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}),
        config_class.from_dict({"id2label": names}),
        config_class.from_dict({"num_classes": 0, "id2label": {str(i): str(i) for i in range(5)}}),
        config_class.from_dict({"num_classes": 7}, num_classes=0),
        config_class.from_dict({"num_classes": 7}, num_labels=0),
        config_class(num_labels=0),
    ):
        assert loaded.num_classes == 0
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).num_classes == 0
    assert AutoConfig.from_pretrained(tmp_path, num_labels=2).num_classes == 2
    two = AutoConfig.from_pretrained(tmp_path, id2label={0: "LABEL_0", 1: "LABEL_1"})
    two.save_pretrained(tmp_path / "two")
    assert AutoConfig.from_pretrained(tmp_path / "two").num_classes == 2


def test_the_distribution_follows_from_the_levels():
    assert PixelCNNConfig().output_distribution == "bernoulli"
    assert PixelCNNConfig(num_levels=16).output_distribution == "categorical"
    assert PixelCNNConfig(output_distribution="categorical").output_distribution == "categorical"
    assert PixelCNNPPConfig().output_distribution == "logistic_mixture"
    assert PixelCNNPPConfig(num_channels=1).output_distribution == "logistic_mixture"
    assert PixelCNNPPConfig(num_channels=1, num_levels=2).output_distribution == "bernoulli"
    assert PixelCNNPPConfig(num_channels=1, input_encoding="embedding").output_distribution == "categorical"
