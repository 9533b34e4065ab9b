"""
What the tests know about a family beside its record, in one module per model type:

    SIZES           fields of its config that small models set otherwise than the other families
    WEIGHT_SCALE    factor on fresh weights that makes levels neither certain nor uniform
    INITIAL_LOSS    relative distance from a uniform distribution that a fresh model may have
    hidden_sizes    (config, height, width) -> height and width of each hidden state
    seen            (config, height, width, row, column, channel) -> the dimensions `(row, column, channel)` that the
                    network's parameters of a dimension depend on, by following each tap of each layer backwards,
                    without any mask: the slow reference
"""

import importlib


def facts(model_type):
    return importlib.import_module(f"families.{model_type}")
