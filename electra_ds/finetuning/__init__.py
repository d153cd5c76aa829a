"""Fine-tuning on GLUE and own tasks."""
