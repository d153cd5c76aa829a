"""The Hugging Face format of an architecture or of a folder."""

from typing import Any

from electra_ds.config.architectures import ModelConfig
from electra_ds.interop.hf_deberta_v2 import DebertaV2Format
from electra_ds.interop.hf_electra import ElectraFormat
from electra_ds.interop.hf_format import HfFormat
from electra_ds.interop.hf_modernbert import ModernBertFormat

FORMATS: tuple[HfFormat, ...] = (ElectraFormat(), ModernBertFormat(), DebertaV2Format())
# Values of model_type in the config.json of folders that can be loaded, and imported.
LOADED_TYPES = tuple(form.model_type for form in FORMATS)
IMPORTED_TYPES = tuple(name for form in FORMATS for name in form.imported_types)


def format_of(model: ModelConfig) -> HfFormat:
    """The format of the exports of an architecture."""
    return next(form for form in FORMATS if form.architecture == model.architecture)


def format_of_type(model_type: Any) -> HfFormat:
    """The format of a folder with this model_type, one of IMPORTED_TYPES."""
    return next(form for form in FORMATS if model_type in form.imported_types)
