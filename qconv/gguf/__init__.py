"""GGUF, the one-file format of llama.cpp: names, keys, tokenizer, blocks; what a file will hold, and reading one."""

from qconv.gguf.blocks import BLOCK, BLOCK_KINDS, KINDS, PLAIN_KINDS, encode, pack, unpack
from qconv.gguf.imatrix import IMATRIX_NAME, InputSquares, write_imatrix
from qconv.gguf.ollama import model_file
from qconv.gguf.package import gguf_package
from qconv.gguf.plan import EMBEDDING, GgufOutput, GgufPlan, plan_gguf
from qconv.gguf.reader import GgufCheckpoint, open_gguf
from qconv.gguf.tokenizer import Vocabulary, vocabulary_of

__all__ = [
    "BLOCK",
    "BLOCK_KINDS",
    "EMBEDDING",
    "IMATRIX_NAME",
    "KINDS",
    "PLAIN_KINDS",
    "GgufCheckpoint",
    "GgufOutput",
    "GgufPlan",
    "InputSquares",
    "Vocabulary",
    "encode",
    "gguf_package",
    "model_file",
    "open_gguf",
    "pack",
    "plan_gguf",
    "unpack",
    "vocabulary_of",
    "write_imatrix",
]
