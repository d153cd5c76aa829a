"""Reading of config files: presets by name, `--set`, errors with suggestions, differences."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from electra_ds.common.errors import UserError
from electra_ds.common.folder_kinds import found_at
from electra_ds.common.json_files import parse_strictly, read_json
from electra_ds.common.printable import printable, shortened
from electra_ds.common.section import Section
from electra_ds.common.suggestions import nearest
from electra_ds.common.urls import check_local
from electra_ds.config.architectures import (
    DEFAULT_ARCHITECTURE,
    MODELS,
    EncoderConfig,
    ModelConfig,
)
from electra_ds.config.phases import phase_differences, phase_values
from electra_ds.config.schema import RUNS, FactoryRun, RunConfig

Config = TypeVar("Config", bound=BaseModel)
Values = dict[str, Any]
MAX_SHOWN = 100  # characters of a wrong value in a message


def config_folder(kind: str) -> Path:
    """Return the folder of the shipped files of a kind: `pretrain`, `engine` or `glue`.

    In a checkout it is beside the package; after an installation it is inside the package.
    """
    package = Path(__file__).resolve().parents[1]
    inside = package / "ds_configs" / kind
    return inside if inside.is_dir() else package.parent / "ds_configs" / kind


def config_names(kind: str) -> list[str]:
    """Return the names of the shipped files of a kind, sorted."""
    return sorted(path.stem for path in config_folder(kind).glob("*.json"))


def find_config(name: str, kind: str) -> Path:
    """Return the path of a shipped config of a kind; a path is returned unchanged.

    name: a path contains "/" or ends in ".json".
    Raises UserError with the known names and the most similar one when the name is unknown, and for
    a folder.
    """
    names = config_names(kind)
    if name in names:
        return config_folder(kind) / f"{name}.json"
    check_local(name, f"{kind} config")
    if os.path.isdir(name):
        hint = _config_of(Path(name)) if kind == "pretrain" else ""
        raise UserError(f"{printable(name)}: is a folder; expected a {kind} config{hint}")
    if name.endswith(".json") or "/" in name:
        return Path(name)
    raise UserError(
        f"no {kind} config named {shortened(name)}{nearest(name, names)}; there are {', '.join(names)}; "
        "or give a path (x.json)"
    )


def _config_of(folder: Path) -> str:
    """Return where the run config of a folder is, as a part of a message; "" if it has none."""
    found = found_at(folder)
    is_checkpoint = found.kind == "checkpoint"
    above = list(folder.resolve().parents)[:2] if is_checkpoint else []  # OUT/ckpt/STEP
    for run in (folder, *above):
        if found.kind in ("run", "checkpoint", "other") and (run / "config.json").is_file():
            return f"{found.clause}: give {printable(run / 'config.json')}"
    return found.clause


def load_run(name: str, sets: Sequence[str] = (), engine: str | None = None) -> RunConfig:
    """Return the checked run config of a preset or of a RUN.json.

    name: name of a preset (`tiny`, `small`, ...) or path of a RUN.json.
    sets: settings such as "train.seed=1", applied in order; the value is JSON or plain text.
    engine: name or path of a DeepSpeed file; replaces the config's `engine`.
    Returns a RunConfig; a FactoryRun if the config has model.factory.
    Raises UserError with file, key, value and the expected value.
    """
    return load_config(name, "pretrain", RunConfig, sets, engine)


def load_config(
    name: str,
    kind: str,
    root: type[Config],
    sets: Sequence[str] = (),
    engine: str | None = None,
) -> Config:
    """Read a config file, apply settings and check the result.

    name: a shipped name of that kind, or a path.
    kind: `pretrain`, `engine` or `glue`.
    root: the schema.
    sets: settings `section.field=value`, as for --set; the value is JSON or plain text.
    engine: replaces the file's `engine`.
    Raises UserError with file, key, value and the expected value.
    """
    values = load_values(name, kind, sets)
    if engine is not None:
        values["engine"] = engine
    return parse_config(values, str(find_config(name, kind)), root)


def load_values(
    name: str,
    kind: str,
    sets: Sequence[str] = (),
    replaced: Mapping[str, Values] | None = None,
) -> Values:
    """Read a config file, replace values and apply settings; the result is not checked.

    replaced: values by section, which replace those of the file before the settings.
    name, kind, sets: as for `load_config`. UserError as well, but for values.
    """
    values = read_json(find_config(name, kind), f"a {kind} config")
    for section, fields in (replaced or {}).items():
        values[section] = {**values[section], **fields}
    apply_settings(values, sets)
    return values


def apply_settings(values: Values, sets: Sequence[str]) -> None:
    """Apply settings such as "train.seed=1" in order to the values of a file, in place.

    Raises UserError for a malformed setting; the values are not checked.
    """
    for setting in sets:
        _apply(values, setting)


def parse_run(values: Values, where: str) -> RunConfig:
    """Check the values of a run config and return it. See `parse_config`."""
    return parse_config(values, where, RunConfig)


def parse_config(values: Any, where: str, root: type[Config]) -> Config:
    """Check the values of a config and return it as `root`.

    A RunConfig is returned as the subclass of its model.architecture, or as a FactoryRun if it has
    model.factory; a ModelConfig as the subclass of its architecture.
    where: name of the file in the error message. Raises UserError with all invalid keys, also for
    a phase with values that do not fit the run.
    """
    schema: Any = root
    if root is RunConfig and isinstance(values, dict):
        schema = _run_schema(values.get("model"), where)
    elif root is ModelConfig:
        schema = MODELS[_architecture(values, where, "architecture")]
    try:
        config = schema.model_validate(values)
    except ValidationError as error:
        raise UserError(_message(error, where, schema)) from None
    if isinstance(config, RunConfig):
        phase_runs(config, where)
    return config


def phase_runs(config: RunConfig, where: str = "run config") -> list[RunConfig]:
    """Return the config of each phase, a run config without phases.

    That of a run without phases is the only one. where: as for `parse_config`. Raises UserError
    with the phase and the field when the values of a phase do not fit the run.
    """
    if not config.phases:
        return [config]
    runs: list[RunConfig] = []
    for phase, values in phase_values(config.model_dump(mode="json"), config.phases):
        try:
            runs.append(type(config).model_validate(values))
        except ValidationError as error:
            message = _message(error, f"{where}: phase {phase.name}", type(config))
            raise UserError(message) from None
    return runs


def _run_schema(model: Any, where: str) -> type[RunConfig]:
    """The schema of a run config with this section `model`."""
    if isinstance(model, dict) and "factory" in model:
        return FactoryRun
    return RUNS[_architecture(model, where, "model.architecture")]


def _architecture(model: Any, where: str, key: str) -> str:
    """The architecture of a section `model`. UserError for an unknown one. key: its name."""
    if not isinstance(model, dict):
        return DEFAULT_ARCHITECTURE  # the schema refuses the section
    name = model.get("architecture", DEFAULT_ARCHITECTURE)
    if isinstance(name, str) and name in MODELS:
        return name
    suggestion = nearest(name, list(MODELS)) if isinstance(name, str) else ""
    raise UserError(
        f"{printable(where)}: {key} = {_as_json(name)}: unknown architecture{suggestion}; "
        f"there are {', '.join(MODELS)}"
    )


def _apply(values: Values, setting: str) -> None:
    """Apply one setting `section.field=value` to the values of a file, in place.

    The value is read as JSON, or as plain text if it is not JSON. Raises UserError for a malformed
    setting.
    """
    key, equals, text = setting.partition("=")
    *sections, field = key.strip().split(".")
    if not equals or not all([*sections, field]):
        raise UserError(
            f"--set {shortened(setting)}: expected section.field=value, such as train.seed=1"
        )
    try:
        value = parse_strictly(text)
    except ValueError:
        value = text
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(
                f"--set {shortened(setting)}: {printable(section)} is a value, not a section"
            )
    values[field] = value


def _message(error: ValidationError, where: str, root: type[BaseModel]) -> str:
    lines: list[str] = []
    foreign: dict[str, list[str]] = {}  # other architecture -> keys that are fields of it
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        is_unknown = problem["type"] == "extra_forbidden"
        if is_unknown and (other := _other_architecture(root, location)):
            foreign.setdefault(other, []).append(printable(".".join(location)))
        else:
            lines.append(_line(dict(problem), root))
    own = next((name for name, schema in RUNS.items() if schema is root), "")
    # First the cause: a config of another architecture also lacks fields of its own.
    causes = [_foreign_line(keys, other, own) for other, keys in foreign.items()]
    return f"{printable(where)}: " + "\n  ".join(causes + lines)


def _foreign_line(keys: list[str], other: str, own: str) -> str:
    """One line for keys that are fields of another architecture than that of the config."""
    fields, those = ("a field", "it") if len(keys) == 1 else ("fields", "them")
    configs = (f"{name} ({', '.join(_presets_of(name))})" for name in (other, own))
    return (
        f"{', '.join(keys)}: {fields} of the architecture {other}, but model.architecture = {own}; "
        f"leave {those} out, or start from a config of one architecture: {' or '.join(configs)}"
    )


def _presets_of(architecture: str) -> list[str]:
    """Names of the shipped run configs of an architecture."""
    files = {name: config_folder("pretrain") / f"{name}.json" for name in config_names("pretrain")}
    models = {name: read_json(path, "a pretrain config")["model"] for name, path in files.items()}
    return [
        name
        for name, model in models.items()
        if model.get("architecture", DEFAULT_ARCHITECTURE) == architecture
    ]


def _line(problem: Values, root: type[BaseModel]) -> str:
    """Return the line of one of pydantic's problems: key, value found, value expected."""
    location = [str(part) for part in problem["loc"]]
    key, value = printable(".".join(location)), problem.get("input")
    if key == "generator.architecture":
        return f"{key}: unknown key; model.architecture is that of both encoders: leave it out"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(root, location[:-1])
        suggestion = nearest(location[-1], known)
        return f"{key}: unknown key{suggestion}; known here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{key}: missing; it has no default"
    if problem["type"] == "value_error":
        text = str(problem["ctx"]["error"])
        return f"{key}: {text}" if key else text
    expected = problem["msg"].lower()
    if problem["type"] == "model_type":
        expected = "expected a JSON object"
    return f"{key} = {_as_json(value)}: {expected}{_fraction_hint(location, value)}"


def _as_json(value: Any) -> str:
    is_plain = isinstance(value, (str, int, float, bool, type(None)))
    text = json.dumps(value, ensure_ascii=False) if is_plain else shortened(value)
    return printable(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}...")


def _fields_at(root: type[BaseModel], path: list[str]) -> list[str]:
    """Return the field names of the section at a path of keys, sorted."""
    for part in path:
        if part not in root.model_fields:  # a key of a dict of sections, such as a task
            continue
        annotation = root.model_fields[part].annotation
        candidates = (annotation, *get_args(annotation))
        root = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return sorted(root.model_fields)


def _other_architecture(root: type[BaseModel], path: list[str]) -> str | None:
    """The architecture of which an unknown key of a run config is a field; None if there is none."""
    if root not in RUNS.values() or path[0] not in ("model", "generator"):
        return None
    others = (name for name, schema in RUNS.items() if not issubclass(root, schema))
    return next((name for name in others if path[-1] in _fields_at(RUNS[name], path[:-1])), None)


def _fraction_hint(location: list[str], value: Any) -> str:
    """Return a hint if a size of the generator is given as a fraction, such as "1/4", else ""."""
    is_size = not location[-1].endswith("_dropout")
    if location[:1] == ["generator"] and is_size and isinstance(value, (str, float)):
        return f"; sizes are not fractions: write the integer, such as {location[-1]}: 64"
    return ""


def differences(old: BaseModel, new: BaseModel) -> tuple[list[str], list[str]]:
    """Return (differences in science fields, differences in machine fields) of two configs.

    Each difference is a text `section.field: old -> new`. The field `provenance` is not compared.
    old, new: configs of the same class, or RunConfigs.
    """
    lines: dict[str, list[str]] = {"science": [], "machine": []}
    _compare(old, new, "", lines)
    return lines["science"], lines["machine"]


def _compare(old: BaseModel, new: BaseModel, prefix: str, lines: dict[str, list[str]]) -> None:
    for name, info in type(old).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        key = f"{prefix}{name}"
        tables = isinstance(before, dict) and isinstance(after, dict)
        sections = before | after if tables else {}
        if key == "phases":
            for scope, found in zip(lines, phase_differences(before, after), strict=True):
                lines[scope] += found
        elif isinstance(before, Section) and type(before) is type(after):
            _compare(before, after, f"{key}.", lines)
        elif isinstance(before, EncoderConfig) and isinstance(after, EncoderConfig):
            # Sections of two architectures: most fields of one have no counterpart in the other.
            if isinstance(before, ModelConfig) and isinstance(after, ModelConfig):
                change = f"{key}.architecture: {before.architecture} -> {after.architecture}"
                lines["science"].append(change)
        elif any(isinstance(section, Section) for section in sections.values()):
            for part, section in sections.items():
                default = type(section)()  # compared if one config lacks the section
                parts = before.get(part, default), after.get(part, default)
                _compare(*parts, f"{key}.{part}.", lines)
        elif before != after and name != "provenance":
            extra = info.json_schema_extra
            scope = str(extra.get("scope", "science")) if isinstance(extra, dict) else "science"
            if tables:  # an engine, or the options of a factory: list only the values that differ
                lines[scope] += _table_differences(before, after, key)
            else:
                change = f"{key}: {_plain(before)} -> {_plain(after)}"
                lines[scope].append(printable(change))


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Section) else value


def _table_differences(before: Values, after: Values, key: str) -> list[str]:
    old, new = _leaves(before, key), _leaves(after, key)
    return [
        printable(f"{name}: {old.get(name, 'not set')} -> {new.get(name, 'not set')}")
        for name in dict.fromkeys([*old, *new])
        if name not in old or name not in new or old[name] != new[name]
    ]


def _leaves(table: Values, prefix: str) -> dict[str, Any]:
    """Return the values of nested dicts by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}.{key}"
        leaves |= _leaves(value, name) if isinstance(value, dict) and value else {name: value}
    return leaves
