"""Classes of the installed transformers."""

from electra_ds.common.errors import UserError


def check_class(name: str) -> None:
    """Raise UserError if transformers is installed and has no class of this name."""
    try:
        import transformers
    except ImportError:
        return
    if not hasattr(transformers, name):
        raise UserError(
            f"transformers {transformers.__version__} has no {name}, the class of a model for "
            "multiple choice; expected a version that has it: pip install -U transformers"
        )
