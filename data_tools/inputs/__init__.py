"""Selection, planning and opening of the input."""
