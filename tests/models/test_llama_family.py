"""Logits of every member of the Llama family, at every position, against transformers, through a paged cache."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def scaled(**rope):
    """A model trained at 32 positions and served at 128."""
    return {"max_position_embeddings": 32, "rope_parameters": {"rope_theta": 10000.0, **rope}}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama": ("Llama", {}),
    "llama, biases, tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama, head_dim": ("Llama", {"head_dim": 24, "num_key_value_heads": 4}),
    "llama, linear": ("Llama", scaled(rope_type="linear", factor=4.0)),
    "llama, dynamic": ("Llama", scaled(rope_type="dynamic", factor=4.0)),
    "llama, yarn": ("Llama", scaled(**YARN)),
    "llama, yarn, all keys": (
        "Llama",
        scaled(**YARN, beta_fast=8.0, beta_slow=0.5, mscale=0.7, mscale_all_dim=1.2, truncate=False),
    ),
    "llama, yarn, attention_factor": ("Llama", scaled(**YARN, attention_factor=1.3)),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3}),
    "smollm": (
        "Llama",
        {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 2}
        | {"tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", {"sliding_window": 13}),
    "mistral, head_dim, no window": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {"use_sliding_window": False, "sliding_window": 16, "tie_word_embeddings": True}),
    "qwen2, max_window_layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen2, layer_types, yarn": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
            **scaled(**YARN),
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3, biases, windows": (
        "Qwen3",
        {"head_dim": 16, "attention_bias": True}
        | {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 2},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 0]}),
}


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def reference(request, tmp_path_factory):
    """A directory with a tiny random model as transformers saves it, four sequences, and their logits by transformers."""
    family, changes = CASES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes}, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As large as leaves attention far from uniform, and norms and biases not at the values that hide them.
            parameter.normal_(
                1.0 if "norm" in name else 0.0, 0.2 if parameter.dim() == 1 else 1.5 * config.hidden_size**-0.5
            )
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory, max_shard_size="100KB" if request.param == "llama" else "5GB")
    assert len(list(directory.glob("*.safetensors"))) > (request.param == "llama")

    # transformers rescales "dynamic" to the longest sequence it has seen, and stays there until one is shorter than the
    # original length. Quire takes max_model_len from the start. So the first sequence has that length, exactly, and none
    # is shorter than 32: then both use one set of frequencies throughout.
    sequences = [torch.randint(config.vocab_size, (length,)).tolist() for length in (128, 33, 77, 101)]
    with torch.inference_mode():
        logits = [model(torch.tensor([ids])).logits[0] for ids in sequences]
    return directory, sequences, logits


def run_in_chunks(model, sequences, chunk_lengths):
    """Feeds the sequences together: row r joins at step 2 r, takes chunks of uneven length, and its last 6 tokens singly.

    So prefills of different lengths and decodes share steps, chunks end inside blocks, and rows come and go.
    """
    logits = [[] for _ in sequences]
    step = 0
    while any(model.seq_lens[row] < len(ids) for row, ids in enumerate(sequences)):
        chunks = {}
        for row, ids in reversed(list(enumerate(sequences))):
            left = ids[model.seq_lens[row] :]
            length = chunk_lengths[(step + row) % len(chunk_lengths)] if len(left) > 6 else 1
            if left and step >= 2 * row:
                chunks[row] = left[:length]
        step += 1
        for row, part in model.step(chunks).items() if chunks else ():
            logits[row].append(part)
    return [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("chunk_lengths", [[128], [7, 1, 16, 5, 23]], ids=["whole", "chunks"])
def test_logits_equal_transformers(reference, paged_model, chunk_lengths):
    directory, sequences, expected = reference
    model = paged_model(directory, max_model_len=128)
    logits = run_in_chunks(model, sequences, chunk_lengths)
    assert expected[0].std() > 0.5  # logits that say something
    for ours, theirs in zip(logits, expected):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < TOLERANCE
