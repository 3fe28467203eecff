"""Looking inside a model: its loads are those of a pass over the same tokens, and do not depend on the reading."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_recipe

from workbench.analysis import coactivation, specialization_report
from workbench.analysis.probe import document_routing, in_sequences, measured_cache_bytes_per_token
from workbench.model.count import cache_bytes
from workbench.model.decoder import Decoder
from workbench.text import InductionTask, Mixture, ModularArithmeticTask, Text, load

CORPORA = Mixture({ModularArithmeticTask(num_documents=300): 1.0, InductionTask(num_documents=300): 1.0})


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Text:
    return load(CORPORA, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def decoder(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(tiny_recipe().model)


def test_loads_of_one_document_by_hand(text):
    model = decoder()
    routing = document_routing(model, text, documents_per_corpus=1, tokens_per_document=40, sequence_length=20)
    assert routing.layer_names == ("layer 1", "mtp 1")
    assert routing.labels == text.names
    documents = [d.text for d in text.validation_documents("induction_0")]
    # A sequence of n tokens routes n in the main model and n - 1 in the first depth, two experts each.
    tokens = [min(40, len(d)) for d in documents]
    assert routing.load[1].sum(1)[0] in {2 * n for n in tokens}
    found = []
    for document in documents:
        load_LE = np.zeros((2, 8), dtype=np.int64)
        for part in torch.from_numpy(text.tokenizer.encode(document)[:40]).long().split(20):
            if len(part) > 1:
                output = model(part[None])
                load_LE += np.stack([r.load.numpy() for r in output.routing if r is not None])
        found.append(np.array_equal(load_LE, routing.load[1]))
    assert any(found)


def test_loads_are_the_counts_of_the_choices_and_repeat(text):
    model = decoder()
    routing, again = (document_routing(model, text, documents_per_corpus=3) for _ in range(2))
    for row, name in enumerate(routing.layer_names):
        counts_E = np.bincount(routing.indices[name].ravel(), minlength=8)
        np.testing.assert_array_equal(counts_E, routing.load.sum(0)[row])
        assert coactivation(routing.indices[name], 8).sum() == 2 * len(routing.indices[name])
    np.testing.assert_array_equal(routing.load, again.load)
    assert sorted(routing.by_corpus()) == sorted(text.names)


def test_untrained_routers_tell_digits_from_letters(text):
    # The two tasks share hardly a byte, so that even random routers send them to different experts.
    report = specialization_report(
        {seed: document_routing(decoder(seed), text, documents_per_corpus=8) for seed in range(3)}
    )
    assert report.above, report.verdict


def test_sequences_leave_out_only_a_rest_that_is_too_short():
    tokens = torch.arange(11)
    assert [tuple(part.shape) for part in in_sequences(tokens, 5, 1)] == [(2, 5), (1, 1)]
    assert [tuple(part.shape) for part in in_sequences(tokens, 5, 2)] == [(2, 5)]
    assert [tuple(part.shape) for part in in_sequences(tokens[:4], 5, 2)] == [(1, 4)]
    assert in_sequences(tokens[:0], 5, 1) == []


def test_measured_cache_bytes_are_those_counted():
    model = decoder()
    assert measured_cache_bytes_per_token(model) == cache_bytes(model.config, 1, "float32")
    bfloat16 = measured_cache_bytes_per_token(model, batch_size=3, dtype=torch.bfloat16)
    assert bfloat16 == cache_bytes(model.config, 1, "bfloat16")


def test_bad_input_is_refused_in_one_line(text):
    config = tiny_recipe().model
    dense = replace(config, layers=config.layers[:1], mtp_layers=())
    for call, line in (
        (lambda: document_routing(Decoder(dense), text), "needs layers with one number of experts, not none"),
        (lambda: document_routing(Decoder(replace(config, vocab_size=300)), text), "vocab_size=300 must be"),
        (lambda: document_routing(decoder(), text, sequence_length=1), "sequence_length=1 lie in 2.."),
        (lambda: document_routing(decoder(), text, documents_per_corpus=0), "documents_per_corpus=0"),
    ):
        with pytest.raises(ValueError, match=line) as refusal:
            call()
        assert "\n" not in str(refusal.value)
