"""What does a run cost? Floating-point operations of a step, bytes on a rank.

Letters: S tokens a row, K chosen places, H hidden, E embedding, F feed-forward, V vocabulary.
"""

from electra_ds.batches import max_chosen
from electra_ds.config import EncoderConfig, RunConfig

PRECISIONS = ("fp32", "half (bf16, fp16)")


def step_flops(config: RunConfig) -> float:
    """Floating-point operations of one training step of a config with its vocabulary: those of the matrix products, 2 a
    multiply-add, backward twice the forward. Rows count as full; look-ups, norms and the optimizer are left out."""
    model, length = config.model, config.data.sequence_length
    places = max_chosen(config.objective.mask_prob, length)

    def encoder(sizes: EncoderConfig) -> int:
        hidden = sizes.hidden_size
        layer = 4 * hidden**2 + 2 * hidden * sizes.ffn_size + 2 * length * hidden  # multiply-adds a token
        project = model.embedding_size * hidden if model.embedding_size != hidden else 0
        return length * (sizes.num_layers * layer + project)

    def words(sizes: EncoderConfig) -> int:
        return places * (sizes.hidden_size + model.vocab_size) * model.embedding_size

    row = encoder(model)
    if config.objective.kind == "mlm":
        row += words(model)
    else:
        row += encoder(config.generator) + words(config.generator)
        row += length * (model.hidden_size + 1) * model.hidden_size
    return 3 * 2 * row * config.train.global_batch_size


def model_state_bytes(parameters: int, world_size: int) -> dict[tuple[int, str], int]:
    """Weights, gradients, fp32 master weights and two moments per rank, as DeepSpeed holds them at each stage.

    Activations, buckets and the word table's padding come on top. fp32 keeps a second copy of the weights from
    stage 1 on (the flat master shards).
    """
    found = {}
    for precision, width in zip(PRECISIONS, (4, 2), strict=True):
        moments = 8 if width == 4 else 12  # stage 0 in fp32 updates the weights in place
        found[0, precision] = (2 * width + moments) * parameters
        for stage, (weights, gradients) in {1: (1, 1), 2: (1, world_size), 3: (world_size, world_size)}.items():
            per_parameter = width / weights + width / gradients + 12 / world_size
            found[stage, precision] = round(per_parameter * parameters)
    return found


def step_traffic(parameters: int, stage: int, world_size: int, accumulation: int, width: int) -> float:
    """Bytes that one rank sends for the weights in an optimizer step, as DeepSpeed 0.19 runs each ZeRO stage.

    width: bytes of a number on the wire (4: fp32 and torch_autocast, 2: bf16 and fp16).
    A ring sends parameters x (n - 1)/n for a reduce-scatter or an all-gather; an all-reduce is both. Stage 0 reduces
    once a step, stage 1 gathers the new weights as well, stage 2 reduces every micro-batch, stage 3 gathers and
    reduce-scatters every micro-batch (below 1e9 parameters it keeps the forward's weights for the backward).
    Stages 1 and 2 all-reduce where a reduce-scatter would do; "use_multi_rank_bucket_allreduce": false sends that third
    less in a call per owner of a bucket. On top come padding, norms and votes: some hundred bytes.
    """
    shares = {0: 2, 1: 3, 2: 2 * accumulation + 1, 3: 2 * accumulation}
    return shares[stage] * parameters * width * (world_size - 1) / world_size
