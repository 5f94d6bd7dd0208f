"""What a Hugging Face model looks at in a text: the one place that knows `transformers`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from regard.look.maps import AttentionMap
from regard.look.recorder import record
from regard.look.tokens import Tokens, grouped_map, tokens


def record_text(model: str, text: str, second: str | None = None, budget: int | str = "1GB") -> list[AttentionMap]:
    """The maps of a model that reads a text, with the text's own characters for tokens.

    Args:
        model: a folder, a .gguf file, or the id of a model on the hub; of a folder or file nothing is fetched.
        text: what it reads.
        second: a second text behind the first; to an encoder–decoder, what is written (None: the text once more).
        budget: as of `regard.record`.

    Raises:
        ValueError: where the model cannot be loaded, or the text is longer than it can read.
    """
    path = Path(model)
    folder, settings = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (model, {})
    try:
        local = path.exists()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=local, **settings)
        network = AutoModel.from_pretrained(folder, local_files_only=local, dtype=torch.float32, **settings).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{model} cannot be loaded: {error}") from error
    if not network.config.is_encoder_decoder:
        read = tokens(tokenizer, text, second)
        inputs = tokenizer(text, second, return_tensors="pt")
        written = read
    else:
        second = text if second is None else second
        read, written = tokens(tokenizer, text), tokens(tokenizer, second)
        inputs = tokenizer(text, return_tensors="pt")
        inputs["decoder_input_ids"] = tokenizer(second, return_tensors="pt")["input_ids"]
    longest = getattr(network.config, "max_position_embeddings", None)
    if longest is not None and max(ids.shape[-1] for ids in inputs.values()) > longest:
        raise ValueError(f"the text has {inputs['input_ids'].shape[-1]} tokens; {model} reads at most {longest}")
    with torch.no_grad(), record(network, budget) as seen:
        network(**inputs)
    return [_labelled(each, read, written) for each in seen]


def _labelled(seen: AttentionMap, read: Tokens, written: Tokens) -> AttentionMap:
    """The map with its tokens; those that share a character in one."""
    keys = written if seen.kind == "self" and "decoder" in seen.name else read
    queries = written if seen.kind == "cross" else keys
    if (len(queries.labels), len(keys.labels)) != seen.shape[2:]:
        seen = grouped_map(seen, queries.spans, keys.spans)
    return seen.labelled(queries.labels, keys.labels)
