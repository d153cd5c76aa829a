"""Settings of small pretraining runs."""

STAGES = (0, 1, 2, 3)  # of ZeRO
STEPS, CUT = 20, 7  # steps of a run of the scenarios; the step where a stopped one is cut
SMALL_MODEL = [
    "model.hidden_size=32",
    "model.ffn_size=64",
    "model.embedding_size=24",
    "model.num_layers=1",
    "generator.hidden_size=16",
    "generator.ffn_size=32",
    "generator.num_layers=1",
]
# A global layer and a local one in both encoders; the window is smaller than a row of 32 tokens.
SMALL_MODERN = [
    "data.sequence_length=32",
    "objective.mask_prob=0.16",
    "model.hidden_size=32",
    "model.ffn_size=24",
    "model.num_layers=2",
    "model.local_attention=8",
    "generator.hidden_size=32",
    "generator.ffn_size=16",
    "generator.num_layers=2",
]
# Fewer buckets than distances in a row of 32 tokens.
SMALL_DEBERTA = [
    "data.sequence_length=32",
    "objective.mask_prob=0.16",
    "model.hidden_size=32",
    "model.ffn_size=48",
    "model.num_layers=2",
    "model.position_buckets=8",
    "generator.hidden_size=32",
    "generator.ffn_size=32",
    "generator.num_layers=1",
]
