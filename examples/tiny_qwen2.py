# SPDX-License-Identifier: Apache-2.0
"""Makes the demo model: a seeded tiny Qwen2 with a tokenizer of its own.

Every byte comes from integers of numpy's PCG64, which gives the same stream on every
platform, and from arithmetic that is exact in float64; so the SHA-256 of the files is
known. The weights are made so that precision faults show: biases are not 0, norm
weights not 1, embeddings have standard deviation 0.02, attention scores 2, and the
first token carries one huge channel, as the attention sinks of real models do.

    python examples/tiny_qwen2.py .demo/tiny-qwen2
"""

import hashlib
import itertools
import json
import math
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

WEIGHTS = "model.safetensors"
FILES = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
SHA256 = "f9b96aa6d6820471aa1866c773356e6f901a124a06991a69e0ecb3d8c4df1312"

HIDDEN = 128
LAYERS = 4
HEADS = 4
KV_HEADS = 2
HEAD_SIZE = 32
INTERMEDIATE = 192
VOCABULARY = 320
SEED = 20261123

EMBEDDING_STD = 0.02
SCORE_STD = 2.0
SINK_CHANNEL = 5
SINK_VALUE = 4.0
BOS, EOS = 0, 1

# The tokenizer's merges are learnt from these lines.
CORPUS = (
    "the quick brown fox jumps over the lazy dog and the dog does not mind at all",
    "precision is the number of digits that survive the journey through a model",
    "a module that computes something else than yesterday should say so itself",
    "the first layer to differ is the one to look at, the others only inherit it",
    "rounding is not an error, but a changed rounding is a change to be explained",
    "numbers, numbers, numbers: sums, norms, means, and where the largest one was",
)


class Stream:
    """Numbers of a bell-shaped distribution from uniform integers."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def __call__(self, *shape: int, std: float) -> np.ndarray:
        """An array of this shape: sums of four 16-bit integers, scaled exactly."""
        size = int(np.prod(shape))
        parts = self._generator.integers(0, 1 << 16, size=(4, size), dtype=np.int64)
        centred = parts.sum(axis=0) - 2 * ((1 << 16) - 1)
        # The sum of four uniform integers below n has variance 4 (n * n - 1) / 12.
        scale = std / math.sqrt(((1 << 32) - 1) / 3)
        return (centred * scale).reshape(shape)

    def permutation(self, size: int) -> np.ndarray:
        """A permutation by sorting random integers."""
        keys = self._generator.integers(0, 1 << 62, size=size, dtype=np.int64)
        return np.argsort(keys, kind="stable")


def make_weights() -> dict[str, np.ndarray]:
    """The weights in float64, by their name in the checkpoint."""
    stream = Stream(SEED)
    embedding = stream(VOCABULARY, HIDDEN, std=EMBEDDING_STD)
    embedding[:, SINK_CHANNEL] = 0.0
    embedding[BOS, SINK_CHANNEL] = SINK_VALUE
    weights = {"model.embed_tokens.weight": embedding}
    for layer in range(LAYERS):
        weights.update(_layer(stream, f"model.layers.{layer}."))
    weights["model.norm.weight"] = 1.0 + stream(HIDDEN, std=0.15)
    # Each token prefers one successor, so that greedy tokens have a clear lead.
    direction = embedding / EMBEDDING_STD
    direction[:, SINK_CHANNEL] = 0.0
    direction[BOS] = 0.0
    successor = stream.permutation(VOCABULARY)
    head = stream(VOCABULARY, HIDDEN, std=1 / math.sqrt(HIDDEN))
    weights["lm_head.weight"] = head + direction[successor] / math.sqrt(HIDDEN)
    return weights


def _layer(stream: Stream, prefix: str) -> dict[str, np.ndarray]:
    """Weights of one decoder layer."""
    queries, keys = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
    # Scores q.k / sqrt(d) have the variance of a query times that of a key.
    score = math.sqrt(SCORE_STD / HIDDEN)
    small = EMBEDDING_STD
    return {
        f"{prefix}input_layernorm.weight": 1.0 + stream(HIDDEN, std=0.15),
        f"{prefix}post_attention_layernorm.weight": 1.0 + stream(HIDDEN, std=0.15),
        f"{prefix}self_attn.q_proj.weight": stream(queries, HIDDEN, std=score),
        f"{prefix}self_attn.k_proj.weight": stream(keys, HIDDEN, std=score),
        f"{prefix}self_attn.v_proj.weight": stream(
            keys, HIDDEN, std=1 / math.sqrt(HIDDEN)
        ),
        f"{prefix}self_attn.q_proj.bias": stream(queries, std=0.3),
        f"{prefix}self_attn.k_proj.bias": stream(keys, std=0.3),
        f"{prefix}self_attn.v_proj.bias": stream(keys, std=0.6),
        f"{prefix}self_attn.o_proj.weight": stream(
            HIDDEN, queries, std=0.3 * small / math.sqrt(queries)
        ),
        f"{prefix}mlp.gate_proj.weight": stream(
            INTERMEDIATE, HIDDEN, std=1 / math.sqrt(HIDDEN)
        ),
        f"{prefix}mlp.up_proj.weight": stream(
            INTERMEDIATE, HIDDEN, std=1 / math.sqrt(HIDDEN)
        ),
        f"{prefix}mlp.down_proj.weight": stream(
            HIDDEN, INTERMEDIATE, std=0.6 * small / math.sqrt(INTERMEDIATE)
        ),
    }


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16 (ties to even), uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, weights: dict[str, np.ndarray]) -> None:
    """Writes a checkpoint in bfloat16, tensors sorted by name."""
    header: dict[str, object] = {}
    chunks = []
    offset = 0
    for name in sorted(weights):
        data = to_bfloat16(weights[name]).tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(weights[name].shape),
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
        chunks.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def model_config() -> dict[str, object]:
    """The content of config.json."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "dtype": "bfloat16",
        "eos_token_id": EOS,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 512,
        "max_window_layers": LAYERS,
        "model_type": "qwen2",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
    }


def _byte_symbols() -> list[str]:
    """A printable character for each byte, as byte-level BPE files write them."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("\u00a1"), ord("\u00ac") + 1),
        *range(ord("\u00ae"), ord("\u00ff") + 1),
    ]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def learn_merges(count: int) -> list[tuple[str, str]]:
    """The `count` most frequent pairs of the corpus, ties by the pair's text."""
    symbols = _byte_symbols()
    words: Counter[tuple[str, ...]] = Counter()
    for line in CORPUS:
        for index, word in enumerate(line.split(" ")):
            text = word if index == 0 else f" {word}"
            words[tuple(symbols[byte] for byte in text.encode())] += 1
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            merged[_merge(word, best)] += times
        words = merged
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    index = 0
    while index < len(word):
        if word[index : index + 2] == pair:
            result.append(pair[0] + pair[1])
            index += 2
        else:
            result.append(word[index])
            index += 1
    return tuple(result)


def tokenizer_files() -> dict[str, object]:
    """The content of tokenizer.json and tokenizer_config.json."""
    symbols = _byte_symbols()
    merges = learn_merges(VOCABULARY - 2 - len(symbols))
    names = ["<s>", "</s>", *symbols, *(a + b for a, b in merges)]
    special = [
        {
            "id": index,
            "content": names[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index in (BOS, EOS)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                first,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": [list(pair) for pair in merges],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def write_model(folder: Path, weights: dict[str, np.ndarray] | None = None) -> str:
    """Writes the model's files.

    Args:
        folder: Made if missing.
        weights: In place of the model's own, e.g. with a planted fault.

    Returns:
        SHA-256 over the files' names and contents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"config.json": model_config(), **tokenizer_files()}
    for name, content in texts.items():
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    write_safetensors(folder / WEIGHTS, weights or make_weights())
    return hash_model(folder)


def hash_model(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's files."""
    total = hashlib.sha256()
    for name in FILES:
        total.update(name.encode() + b"\0" + (folder / name).read_bytes())
    return total.hexdigest()


def make_model(folder: Path) -> str:
    """Makes the model and moves its files into the folder once their hash is right.

    Args:
        folder: Made if missing; the weights are moved last, so that they are there
            only if the rest is.

    Returns:
        SHA-256 of what was made; where it is not the known one, nothing was moved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as place:
        temporary = Path(place)
        found = write_model(temporary)
        if found == SHA256:
            for name in sorted(FILES, key=lambda name: name == WEIGHTS):
                (temporary / name).replace(folder / name)
    return found


def main() -> int:
    """Makes the model in the folder given and checks its hash."""
    folder = Path(sys.argv[1])
    found = make_model(folder)
    if found != SHA256:
        print(
            f"{folder}: SHA-256 {found}, expected {SHA256}; not written",
            file=sys.stderr,
        )
        return 1
    print(f"{folder}: SHA-256 {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
