"""Fine-tuning: GLUE and own tasks, from examples to scores, report and submission."""
