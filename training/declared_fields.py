"""
Fields of dataclasses, read from their source text: to import them would import torch, which takes seconds, and a
command line is to be checked before that. A test holds what is read here against the classes themselves.
"""

import ast
import dataclasses
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple


class Declared(NamedTuple):
    """
    A field: its type; its default, `MISSING` if it has none and `None` if that is no literal; its metadata that are
    literals.
    """

    type: Any
    default: Any
    metadata: dict[str, Any]


def package_folder(name: str) -> Path:
    """Where a package is, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f"there is no package {name}.")
    return Path(spec.origin).parent


def literal(node: ast.expr | None, otherwise: Any = None) -> Any:
    """The value of an expression that is a literal."""
    try:
        return otherwise if node is None else ast.literal_eval(node)
    except ValueError:
        return otherwise


def classes_in(paths: Iterable[Path]) -> dict[str, ast.ClassDef]:
    """The classes at the top of source files, by name."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in paths)
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def enums_of(classes: dict[str, ast.ClassDef]) -> dict[str, Any]:
    """The string enumerations among classes, each as the type of its values."""
    values = {
        name: [literal(node.value) for node in class_.body if isinstance(node, ast.Assign)]
        for name, class_ in classes.items()
        if any(ast.unparse(base).endswith("Enum") for base in class_.bases)
    }
    return {name: Literal[tuple(found)] for name, found in values.items() if found}


def declared_field(node: ast.AnnAssign, known: dict[str, Any]) -> Declared | None:
    r"""
    What a line such as `seed: int = field(default=42, metadata=...)` declares.

    Args:
        node (`ast.AnnAssign`): The line.
        known (`dict`): Types that its annotation may name, besides the built-in ones.

    Returns:
        [`Declared`], or `None` if the type is another one: no command line can give a value of it.
    """
    try:
        kind = eval(ast.unparse(node.annotation), dict(known))  # annotations of transformers and of this package only
    except NameError:
        return None
    words, metadata = {}, {}
    if isinstance(node.value, ast.Call):
        words = {word.arg: word.value for word in node.value.keywords}
    if isinstance(described := words.get("metadata"), ast.Dict):
        pairs = zip(described.keys, described.values, strict=True)
        metadata = {literal(key): literal(value) for key, value in pairs if literal(value) is not None}
    default = literal(words.get("default") if words else node.value)
    if node.value is None or (words and not words.keys() & {"default", "default_factory"}):
        default = dataclasses.MISSING
    return Declared(kind, default, metadata)


def declared_fields(name: str, classes: dict[str, ast.ClassDef], known: dict[str, Any]) -> dict[str, Declared]:
    """The fields of the class `name`, and of those of its bases that are among `classes`, bases first."""
    fields = {}
    for base in classes[name].bases:
        if ast.unparse(base) in classes:
            fields |= declared_fields(ast.unparse(base), classes, known)
    for node in classes[name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            declared = declared_field(node, known)
            if declared is not None:
                fields[node.target.id] = declared
    return fields


def fields_of_training_arguments() -> dict[str, Declared]:
    """The fields of `PixelCNNTrainingArguments`, those of `TrainingArguments` of transformers first."""
    transformers = package_folder("transformers")
    names = ("debug_utils", "trainer_utils", "training_args")
    trainer = package_folder("hf_pixelcnn") / "training" / "trainer.py"
    classes = classes_in([*(transformers / f"{name}.py" for name in names), trainer])
    known = {"Any": Any, "Literal": Literal, **enums_of(classes)}
    return declared_fields("PixelCNNTrainingArguments", classes, known)


def fields_of_configs() -> dict[str, dict[str, Declared]]:
    """The fields of the configs of all families of the package, by `model_type`, sorted by that."""
    classes = classes_in(package_folder("hf_pixelcnn").glob("configuration_*.py"))
    families = {}
    for name, class_ in classes.items():
        for node in class_.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "model_type":
                families[literal(node.value)] = declared_fields(name, classes, {})
    return dict(sorted(families.items()))


def fields_of_script(path: str) -> dict[str, Declared]:
    """The fields of the dataclass of a script that describes its options, `...Arguments`."""
    classes = classes_in([Path(path)])
    (name,) = [name for name in classes if name.endswith("Arguments")]
    return declared_fields(name, classes, {})


def as_options(fields: dict[str, Declared]) -> list[tuple[str, Any, Any]]:
    """Fields for `dataclasses.make_dataclass`, in which a value that is not given is the default."""
    return [
        (name, declared.type, dataclasses.field(default=declared.default, metadata=declared.metadata))
        for name, declared in fields.items()
    ]
