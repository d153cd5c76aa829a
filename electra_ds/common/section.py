"""Base class of config sections, and the scope of their fields."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def science(default: Any, meaning: str, **limits: Any) -> Any:
    """Return a field of scope "science": its value changes what the model learns.

    meaning: the description of the field. limits: passed to pydantic's Field.
    """
    return Field(default, description=meaning, json_schema_extra={"scope": "science"}, **limits)


def machine(default: Any, meaning: str, **limits: Any) -> Any:
    """Return a field of scope "machine": its value does not change what the model learns.

    Such fields set speed, evaluation, logging, checkpoints and the handling of faults.

    meaning: the description of the field. limits: passed to pydantic's Field.
    """
    return Field(default, description=meaning, json_schema_extra={"scope": "machine"}, **limits)


class Section(BaseModel):
    """Base class of config sections: frozen, strict types, no unknown keys, only finite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False
    )
