"""What the tests know about a family beside its record: `FACTS`, in one module per model type."""

import importlib


class Facts:
    """What holds for networks of one resolution; a family says what is different."""

    SIZES = {}  # fields of its config that small models set otherwise than the other families
    WEIGHT_SCALE = 1.5  # factor on fresh weights that makes levels neither certain nor uniform
    INITIAL_LOSS = 0.1  # relative distance from a uniform distribution that a fresh model may have

    def hidden_shapes(self, config, height, width):
        """Features, height and width of each hidden state: of what enters the first layer, and of what each gives."""
        return [(config.hidden_size, height, width)] * (config.num_hidden_layers + 1)

    def seen(self, config, height, width, row, column, channel):
        """
        The dimensions `(row, column, channel)` that the network's parameters of a dimension depend on, by following
        each tap of each layer backwards, without any mask: the slow reference.
        """
        raise NotImplementedError


def facts(model_type):
    return importlib.import_module(f"families.{model_type}").FACTS
