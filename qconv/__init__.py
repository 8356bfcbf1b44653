"""QLoRA adapter in, deployable quantized model out, and proof that it behaves like the model that was trained."""

__version__ = "0.1.0"
