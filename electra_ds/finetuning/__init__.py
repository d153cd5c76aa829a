"""Fine-tuning on GLUE and on tasks that users describe."""
