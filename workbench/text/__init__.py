"""Real text as resumable batches of token ids: corpora, tokenizers, the split, the order, the floors. numpy out."""

from workbench.text.batches import Batch, Batches
from workbench.text.byte_pairs import BytePairs, BytePairTokenizer
from workbench.text.corpus import Corpus, Document
from workbench.text.files import Files
from workbench.text.floors import Floors
from workbench.text.mixture import Mixture
from workbench.text.stdlib import StdlibCode, StdlibProse
from workbench.text.tasks import CopyTask, InductionTask, MarkovTask, ModularArithmeticTask
from workbench.text.text import Text, load
from workbench.text.tokenizer import Bytes, ByteTokenizer, Tokenizer, TokenizerSpec

__all__ = [
    "Batch",
    "Batches",
    "BytePairTokenizer",
    "BytePairs",
    "ByteTokenizer",
    "Bytes",
    "CopyTask",
    "Corpus",
    "Document",
    "Files",
    "Floors",
    "InductionTask",
    "MarkovTask",
    "Mixture",
    "ModularArithmeticTask",
    "StdlibCode",
    "StdlibProse",
    "Text",
    "Tokenizer",
    "TokenizerSpec",
    "load",
]
