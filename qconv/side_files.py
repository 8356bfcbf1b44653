"""Files of a model folder that are not weights and leave as they came."""

from __future__ import annotations

from pathlib import Path

from qconv.errors import CheckpointError

VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""One of these makes a tokenizer."""
_TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
LQ_LORA_MODEL = "full_model.pth"
"""In which LQ-LoRA pickles the base that it decomposed, and the adapter with it."""
_OTHERS = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
_LICENSES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that make up its tokenizer and chat template."""
    names = (*VOCABULARY_FILES, *_TOKENIZER_EXTRAS, *_TEMPLATES)
    return [folder / name for name in names if (folder / name).is_file()]


def tokenizer_folder(base: Path, adapter: Path | None) -> Path:
    """The adapter's folder when it brings a tokenizer of its own, else the base's."""
    if adapter is not None and any((adapter / name).is_file() for name in VOCABULARY_FILES):
        return adapter
    return base


def side_files(base: Path, adapter: Path | None) -> list[Path]:
    """Tokenizer, chat template, generation config and licence of an output, byte for byte from their source.

    The tokenizer comes whole from the adapter where it has one, otherwise whole from the base; a chat
    template is the adapter's where it has one.
    """
    files = [file for file in tokenizer_files(tokenizer_folder(base, adapter)) if file.name not in _TEMPLATES]
    template = template_file(base, adapter)
    files += [] if template is None else [template]
    files += [base / name for name in _OTHERS if (base / name).is_file()]
    return files + sorted(file for pattern in _LICENSES for file in base.glob(pattern) if file.is_file())


def template_file(base: Path, adapter: Path | None) -> Path | None:
    """The file of the chat template of an output; None where there is none, or it lies in ``tokenizer_config.json``."""
    files = [folder / name for folder in (adapter, base) if folder for name in _TEMPLATES]
    return next((file for file in files if file.is_file()), None)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and not a model.

    Raises:
        CheckpointError: it holds both.
    """
    if not (folder / "adapter_config.json").is_file():
        return False
    if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
        raise CheckpointError(
            f"{folder}: holds a model (config.json) and an adapter (adapter_config.json); keep them in folders of "
            "their own"
        )
    return True
