"""Reading of config files: presets by name, `--set`, errors with suggestions, differences."""

import json
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from electra_ds.common.errors import UserError
from electra_ds.common.files import read_json
from electra_ds.common.section import Section
from electra_ds.common.suggestions import nearest
from electra_ds.config.schema import FactoryRun, RunConfig

Config = TypeVar("Config", bound=BaseModel)


def config_folder(kind: str) -> Path:
    """The folder of shipped files, `pretrain`, `engine` or `glue`: beside the package, or inside an installed one."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "ds_configs" / kind
    return inside if inside.is_dir() else package.parent / "ds_configs" / kind


def find_config(name: str, kind: str) -> Path:
    """The file of a shipped name, or the path itself. UserError lists the names and the nearest one."""
    if name.endswith(".json") or "/" in name:
        return Path(name)
    folder = config_folder(kind)
    names = sorted(path.stem for path in folder.glob("*.json"))
    if name in names:
        return folder / f"{name}.json"
    raise UserError(
        f"no {kind} config named {name!r}{nearest(name, names)}; there are {', '.join(names)}; or give a path (x.json)"
    )


def load_run(name: str, sets: list[str] = (), engine: str | None = None) -> RunConfig:
    """`load_config` of a RUN.json."""
    return load_config(name, "pretrain", RunConfig, sets, engine)


def load_config(
    name: str, kind: str, root: type[Config], sets: list[str] = (), engine: str | None = None
) -> Config:
    """Read a config file (shipped name of that kind, or path), apply `section.field=value` settings, check everything.

    Raises UserError naming the file, the key, what was found and what was expected.
    """
    path = find_config(name, kind)
    values = read_json(path, f"a {kind} config")
    for setting in sets:
        _apply(values, setting)
    if engine is not None:
        values["engine"] = engine
    return parse_config(values, str(path), root)


def parse_run(values: dict, where: str) -> RunConfig:
    """`parse_config` of a run."""
    return parse_config(values, where, RunConfig)


def parse_config(values: dict, where: str, root: type[Config]) -> Config:
    """Check a config object; `where` is named in the error. A run whose model has a factory becomes a FactoryRun."""
    model = values.get("model")
    root = (
        FactoryRun if root is RunConfig and isinstance(model, dict) and "factory" in model else root
    )
    try:
        return root.model_validate(values)
    except ValidationError as error:
        raise UserError(_readable(error, where, root)) from None


def _apply(values: dict, setting: str) -> None:
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {setting!r}: expected section.field=value, such as train.seed=1")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {setting!r}: {part} is a value, not a section")
    values[parts[-1]] = value


def _readable(error: ValidationError, where: str, root: type[BaseModel]) -> str:
    lines = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        key, found = ".".join(location), problem.get("input")
        if problem["type"] == "extra_forbidden":
            known = _fields_at(root, location[:-1])
            lines.append(
                f"{key}: unknown key{nearest(location[-1], known)}; known here: {', '.join(known)}"
            )
        elif problem["type"] == "missing":
            lines.append(f"{key}: missing; it has no default")
        elif problem["type"] == "value_error":
            lines.append(
                f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
            )
        else:
            hint = _fraction_hint(root, location, found)
            lines.append(
                f"{key} = {json.dumps(found, default=str)}: {problem['msg'].lower()}{hint}"
            )
    return f"{where}: " + "\n  ".join(lines)


def _fields_at(root: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        if part not in root.model_fields:  # a name in a table of sections
            continue
        kind = root.model_fields[part].annotation
        root = next(
            k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)
        )
    return sorted(root.model_fields)


def _fraction_hint(root: type[BaseModel], location: list[str], found: Any) -> str:
    if location[:1] == ["generator"] and isinstance(found, (str, float)):
        return (
            f"; the generator has sizes of its own: write the integer, such as {location[-1]}: 64"
        )
    return ""


def differences(old: RunConfig, new: RunConfig) -> tuple[list[str], list[str]]:
    """(science, machine) fields that differ, as `section.field: old -> new`."""
    found: dict[str, list[str]] = {"science": [], "machine": []}

    def compare(a: BaseModel, b: BaseModel, prefix: str) -> None:
        for name, info in type(a).model_fields.items():
            x, y = getattr(a, name), getattr(b, name)
            names = x | y if isinstance(x, dict) and isinstance(y, dict) else {}
            if isinstance(x, Section) and type(x) is type(y):
                compare(x, y, f"{prefix}{name}.")
            elif any(isinstance(section, Section) for section in names.values()):
                for key, section in names.items():  # one that is not named has the defaults
                    compare(
                        x.get(key, type(section)()),
                        y.get(key, type(section)()),
                        f"{prefix}{name}.{key}.",
                    )
            elif x != y and name != "provenance":
                x, y = (
                    value.model_dump() if isinstance(value, Section) else value for value in (x, y)
                )
                found[(info.json_schema_extra or {}).get("scope", "science")].append(
                    f"{prefix}{name}: {x} -> {y}"
                )

    compare(old, new, "")
    return found["science"], found["machine"]
