"""Base class of config sections, and the scope of their fields."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def science(default: Any, meaning: str, **limits: Any) -> Any:
    """A field that decides what is learned."""
    return Field(default, description=meaning, json_schema_extra={"scope": "science"}, **limits)


def machine(default: Any, meaning: str, **limits: Any) -> Any:
    """A field that decides where and how fast a run computes, or what is watched."""
    return Field(default, description=meaning, json_schema_extra={"scope": "machine"}, **limits)


class Section(BaseModel):
    """A frozen config section that refuses unknown keys and other types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
