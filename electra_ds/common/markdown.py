"""Text from files in Markdown: tables and lists of model cards and reports."""

from electra_ds.common.printable import printable
from electra_ds.common.redaction import redacted


def inline(value: str) -> str:
    """Return `value` as text of one line, without HTML, code, links, images and ends of cells.

    Names, labels and notes come from files of other people. Secrets of URLs are removed.
    """
    text = printable(redacted(value)).replace("|", "\\|").replace("\\\\|", "&#92;\\|")
    text = text.replace("<", "&lt;").replace("`", "&#96;")
    return text.replace("](", "]&#40;")
