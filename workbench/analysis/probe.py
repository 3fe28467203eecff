"""Running a model over text and looking inside: which experts take which documents, and what its cache really holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.analysis.cache import COLUMNS, variants
from workbench.analysis.specialization import DocumentRouting
from workbench.model.config import ModelConfig
from workbench.model.count import Precision
from workbench.model.decoder import Decoder
from workbench.text import Text

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.inference_mode()
def document_routing(
    decoder: Decoder,
    text: Text,
    *,
    documents_per_corpus: int = 32,
    tokens_per_document: int = 1024,
    sequence_length: int = 256,
    seed: int = 0,
) -> DocumentRouting:
    """Where the experts of `decoder` send the validation documents of `text`.

    Of each corpus `documents_per_corpus` documents are read, drawn by `seed`, the same ones for every model, each up to
    `tokens_per_document` tokens in sequences of `sequence_length` that start afresh. A prediction depth k covers all
    but the last k tokens of a sequence; sequences too short for the deepest are left out.

    Raises:
        ValueError: the model has no experts, its layers differ in their number, its vocabulary is not the text's, a
            size is out of range, or a corpus has no validation document that is long enough.
    """
    layers = decoder.config.expert_layers()
    counts = {experts.n_routed_experts for _, experts in layers}
    if len(counts) != 1:
        raise ValueError(f"document_routing needs layers with one number of experts, not {sorted(counts) or 'none'}")
    if decoder.config.vocab_size != text.tokenizer.vocab_size:
        raise ValueError(
            f"the model's vocab_size={decoder.config.vocab_size} must be the tokenizer's {text.tokenizer.vocab_size}"
        )
    shortest = len(decoder.config.mtp_layers) + 1
    if documents_per_corpus < 1 or not shortest <= sequence_length <= tokens_per_document:
        raise ValueError(
            f"documents_per_corpus={documents_per_corpus} must be at least 1, and sequence_length={sequence_length} "
            f"lie in {shortest}..{tokens_per_document} (tokens_per_document)"
        )
    (num_experts,) = counts
    device = decoder.embed_tokens.weight.device
    labels: list[str] = []
    loads: list[np.ndarray] = []
    choices: dict[str, list[np.ndarray]] = {name: [] for name, _ in layers}
    for corpus in text.names:
        documents = text.validation_documents(corpus)
        before = len(labels)
        for index in np.random.default_rng(seed).permutation(len(documents)):
            if len(labels) - before == documents_per_corpus:
                break
            tokens = torch.from_numpy(text.tokenizer.encode(documents[index].text)[:tokens_per_document]).long()
            load_LE = np.zeros((len(layers), num_experts), dtype=np.int64)
            for tokens_BT in in_sequences(tokens, sequence_length, shortest):
                routed = [r for r in decoder(tokens_BT.to(device)).routing if r is not None]
                for row, ((name, _), routing) in enumerate(zip(layers, routed, strict=True)):
                    load_LE[row] += routing.load.cpu().numpy()
                    choices[name].append(routing.indices.cpu().numpy())
            if load_LE.any():
                labels.append(corpus)
                loads.append(load_LE)
        if len(labels) == before:
            raise ValueError(f"corpus {corpus!r} has no validation document of {shortest} tokens or more")
    return DocumentRouting(
        layer_names=tuple(name for name, _ in layers),
        labels=tuple(labels),
        load=np.stack(loads),
        indices={name: np.concatenate(parts) for name, parts in choices.items()},
    )


def in_sequences(tokens: Tensor, sequence_length: int, shortest: int) -> list[Tensor]:
    """`tokens` cut into one batch of whole sequences and one of the rest, without a rest shorter than `shortest`."""
    whole = len(tokens) // sequence_length
    batches = [tokens[: whole * sequence_length].view(whole, sequence_length), tokens[None, whole * sequence_length :]]
    return [batch for batch in batches if batch.shape[0] > 0 and batch.shape[1] >= shortest]


def measured_cache_bytes_per_token(decoder: Decoder, *, batch_size: int = 1, dtype: torch.dtype | None = None) -> int:
    """Bytes by which the tensors of the decoder's cache grow with each token of each sequence, over all layers."""
    short, long = (decoder.new_cache(batch_size, length, dtype).nbytes for length in (64, 128))
    grown = (long - short) / (64 * batch_size)
    assert grown == int(grown), "every layer keeps whole elements of each token"
    return int(grown)


def measured_cache_table(
    config: ModelConfig,
    contexts: Sequence[int],
    *,
    batch_sizes: Sequence[int] = (1,),
    precisions: Sequence[Precision] = ("float32",),
) -> pd.DataFrame:
    """The rows of `analysis.cache_table` measured: a decoder of each kind of attention is made, and its caches weighed.

    The caches are really allocated, so contexts and models must fit into memory.

    Raises:
        ValueError: a precision in which no cache can be kept, or a size below 1.
    """
    unknown = [precision for precision in precisions if precision not in TORCH_DTYPES]
    if unknown:
        raise ValueError(f"precision={unknown[0]!r} must be one of {', '.join(TORCH_DTYPES)} to be measured")
    rows = []
    for kind, model in variants(config).items():
        decoder = Decoder(model)
        for precision in precisions:
            dtype = TORCH_DTYPES[precision]
            token_bytes = measured_cache_bytes_per_token(decoder, dtype=dtype)
            elements = token_bytes // dtype.itemsize
            for batch_size in batch_sizes:
                for context in contexts:
                    whole = decoder.new_cache(batch_size, context, dtype).nbytes
                    rows.append((kind, precision, batch_size, context, elements, token_bytes, whole, "measured"))
    return pd.DataFrame(rows, columns=list(COLUMNS))
