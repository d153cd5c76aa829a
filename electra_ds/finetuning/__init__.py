"""Fine-tuning on GLUE and on tasks of the user's own."""
