"""Engines of other containers than safetensors, and why they are refused. An export that makes such a container makes
an `Engine` of its row here.
"""

from __future__ import annotations

FOREIGN = {
    "ollama": (
        "Ollama's Modelfile names a GGUF file (https://docs.ollama.com/import), and {folder} holds safetensors "
        "({layout}); --requant gguf-q4_0, or convert --to gguf-q8_0, makes one, and a Modelfile beside it"
    ),
}
"""By name: the words of the refusal, with places for the folder and its layout."""
