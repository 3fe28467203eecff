"""Tokenizers lose nothing, count bytes rightly and come out the same every time."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.text import BytePairs, Bytes, Tokenizer
from workbench.text.cache import Cache

# Any text that UTF-8 can hold: NUL, lone combining marks, right-to-left letters, emoji, everything but surrogates.
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
HARD = [
    "",
    "\0",
    "a\0\0b",
    "\u0301",
    "👩‍👩‍👧🏽",
    "שלום\u202eabc",
    "\ufeffx",
    "\r\n\t  \n",
    "<|endoftext|><separator>",
    "Ġ Ċ",
]
TRAINING = [f"def function_{i % 17}(argument):\n    return argument + {i}\n" for i in range(300)]
VOCAB_SIZE = 400


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return BytePairs(VOCAB_SIZE).fit(TRAINING, "test", Cache(tmp_path_factory.mktemp("cache")))


def check_round_trip(tokenizer: Tokenizer, text: str, num_bytes: int) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == num_bytes
    assert b"".join(tokenizer.token_bytes(int(token)) for token in ids) == text.encode()


@settings(deadline=None)
@given(UNICODE)
def test_byte_pairs_round_trip(byte_pairs: Tokenizer, text: str) -> None:
    check_round_trip(byte_pairs, text, len(text.encode()))
    assert byte_pairs.separator not in byte_pairs.encode(text)


@settings(deadline=None)
@given(UNICODE)
def test_bytes_round_trip(text: str) -> None:
    # Byte 0 is the separator of this vocabulary and counts no bytes.
    check_round_trip(Bytes().fit([], "", Cache(Path())), text, len(text.replace("\0", "").encode()))


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_round_trip(byte_pairs: Tokenizer, text: str) -> None:
    check_round_trip(byte_pairs, text, len(text.encode()))


def test_vocabulary(byte_pairs: Tokenizer) -> None:
    assert byte_pairs.vocab_size == VOCAB_SIZE == len(byte_pairs.byte_lengths)
    assert byte_pairs.separator == VOCAB_SIZE - 1
    assert byte_pairs.byte_lengths[byte_pairs.separator] == 0
    assert (np.delete(byte_pairs.byte_lengths, byte_pairs.separator) > 0).all()
    assert len(byte_pairs.encode(TRAINING[0])) < len(TRAINING[0]) / 3
    tokens = [byte_pairs.token_bytes(token) for token in range(VOCAB_SIZE - 1)]
    assert len(set(tokens)) == len(tokens) and {bytes([byte]) for byte in range(256)} <= set(tokens)


def test_tokens_for_the_eye(byte_pairs: Tokenizer) -> None:
    lone = int(byte_pairs.encode("é")[0])
    assert byte_pairs.token_text(lone) == "\\xc3"
    assert byte_pairs.decode([lone]) == "\ufffd"
    assert " ".join(byte_pairs.token_text(int(token)) for token in byte_pairs.encode("def function")) == "def  function"
    for tokenizer in (byte_pairs, Bytes().fit([], "", Cache(Path()))):
        assert tokenizer.token_text(tokenizer.separator) == "<separator>"
        assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.separator, *tokenizer.encode("b")]) == "a\0b"


def test_training_is_deterministic_and_kept(byte_pairs: Tokenizer, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from workbench.text import BytePairs\nfrom workbench.text.cache import Cache\n"
        f"texts = {TRAINING!r}\n"
        f"print(BytePairs({VOCAB_SIZE}).fit(texts, 'test', Cache(Path(sys.argv[1]))).fingerprint)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    fresh = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert fresh.stdout.strip() == byte_pairs.fingerprint
    # From the cache, without a look at the texts.
    assert BytePairs(VOCAB_SIZE).fit([], "test", Cache(tmp_path)).fingerprint == byte_pairs.fingerprint
    assert BytePairs(VOCAB_SIZE - 1).fit(TRAINING, "test", Cache(tmp_path)).fingerprint != byte_pairs.fingerprint


def test_refusals(byte_pairs: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
        BytePairs(256)
    with pytest.raises(ValueError, match=r"vocab_size=5000 is more than the text yields; it must lie in 257\.\.\d+$"):
        BytePairs(5000).fit(TRAINING, "test", Cache(tmp_path))
    for tokenizer in (byte_pairs, Bytes().fit([], "", Cache(tmp_path))):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            tokenizer.encode("\ud800")
