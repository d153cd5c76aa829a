"""Pretraining of text encoders by replaced token detection (ELECTRA) on DeepSpeed."""


def __getattr__(name: str):
    """`Electra`, the wrapper for modules of the user's own: loaded when asked for, since it needs torch."""
    if name == "Electra":
        from electra_ds.model.wrapper import Electra

        return Electra
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
