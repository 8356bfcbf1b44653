"""The transformers model of a checkpoint, its parameters on the meta device, and what its modules are called.

What the linear layers are called is all that some jobs ask. For the families in `_FAMILIES` it is known here, and
transformers' modeling code, which takes seconds to import, is left alone: but only where every tensor of the checkpoint
has a name and shape that such a model has. Of anything else transformers is asked.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qconv.errors import CheckpointError
from qconv.expert_modules import router_modules, separate_experts
from qconv.experts import FAMILIES, expert_of, has_experts, names_of
from qconv.own_process import importing_libraries, without_collections
from qconv.suggest import did_you_mean
from qconv.types import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # values of model_type
_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {  # values of rope_type, with what each needs
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_OTHER_WAYS = ("_attn_implementation", "attn_implementation", "text_config", "sub_configs")  # of making a model
_PLAIN_MERGE = "no --requant, --no-validate, and a base that is stored in 4 bits or --trained-on 16bit"

_last_built: dict[str, nn.Module] = {}


def model_config(view: Checkpoint) -> PreTrainedConfig:
    """A checkpoint's ``config.json`` as transformers understands it.

    Raises:
        CheckpointError: an unknown architecture, or values that it refuses.
    """
    with importing_libraries():
        from transformers import CONFIG_MAPPING, AutoConfig, __version__

    family = view.config.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        found = "has no model_type" if family is None else f"has model_type {family!r}"
        raise CheckpointError(
            f"{view.location}: config.json {found}; expected one of the {len(CONFIG_MAPPING)} families of "
            f"transformers {__version__}{did_you_mean(str(family), CONFIG_MAPPING.keys())}. A newer release may have "
            f"it; a plain merge does without: {_PLAIN_MERGE}"
        )
    fields = {key: value for key, value in view.config.items() if key != "quantization_config"}
    with _blamed_on_config(view):
        return AutoConfig.for_model(**fields)


def text_config(view: Checkpoint) -> PreTrainedConfig:
    """The part of `model_config` that describes the decoder: all of it, unless the model is composite."""
    return model_config(view).get_text_config(decoder=True)


def build_skeleton(view: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The transformers model of a checkpoint's config, its parameters on the meta device.

    Experts are linears of their own, see `expert_modules`. A copy of the one that was built last, where config and
    dtype are the same: the models of a comparison are alike.
    """
    with importing_libraries():
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

    config = model_config(view)
    key = f"{dtype} {config.to_json_string(use_diff=False)}"
    if key not in _last_built:
        # The code of the family is imported when its model is built.
        with without_collections(), _blamed_on_config(view), init_empty_weights(include_buffers=False):
            built: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
        names = names_of(view.config)
        if names is not None:
            separate_experts(built, names)
        _last_built.clear()
        _last_built[key] = built
    model = _last_built[key]
    # Parameters without values are not worth copies: whoever fills one in puts another in its place.
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@contextmanager
def _blamed_on_config(view: Checkpoint) -> Iterator[None]:
    """transformers builds from user input here; what it raises for a bad one has no common type."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{view.location}: transformers cannot build a causal language model from config.json "
            f"(model_type {view.config.get('model_type')!r}): {type(error).__name__}: {error}"
        ) from error


def find_blocks(model: nn.Module, location: str) -> tuple[str, nn.ModuleList]:
    """The decoder layers and their name: the list of ``num_hidden_layers`` modules nearest the top."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    count = getattr(config, "num_hidden_layers", None)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise CheckpointError(f"{location}: found no list of {count} decoder layers in {type(model).__name__}")
    return min(found, key=lambda pair: pair[0].count("."))


def linear_weights(view: Checkpoint) -> list[str]:
    """The weights that qconv quantizes: of all `nn.Linear` inside the decoder blocks, in the model's order.

    But for those that choose experts (`ExpertNames.unquantized`). See `linears_of_training` for bitsandbytes.

    Raises:
        CheckpointError: transformers cannot build the architecture, or the view has not all of them.
    """
    blocks = StoredBlocks.of(view)
    if blocks is not None:
        return blocks.linears
    model = build_skeleton(view, torch.bfloat16)
    layers_name, _ = find_blocks(model, view.location)
    inside = [name for name in _linear_modules(model) if name.startswith(layers_name + ".")]
    experts = names_of(view.config)
    left_out = () if experts is None else experts.unquantized
    names = [f"{name}.weight" for name in inside if name.rpartition(".")[2] not in left_out]
    _check_names(names, model, view)
    return names


def linears_of_training(view: Checkpoint, with_experts: bool) -> list[str]:
    """The weights that bitsandbytes quantizes when a model is loaded in 4 bits: those of all linears in the blocks.

    Args:
        with_experts: of a mixture of experts, the experts and the router, too. They were linears until release 5 of
            transformers, and are bare parameters since, which bitsandbytes leaves alone.

    Raises:
        CheckpointError: as `linear_weights` raises it.
    """
    experts = names_of(view.config)
    if experts is None:
        return linear_weights(view)
    model = build_skeleton(view, torch.bfloat16)
    layers_name, _ = find_blocks(model, view.location)
    modules = [name for name in _linear_modules(model) if name.startswith(layers_name + ".")]
    if with_experts:
        modules += router_modules(model)
    else:
        modules = [name for name in modules if expert_of(name) is None]
    names = [f"{name}.weight" for name in modules]
    _check_names(names, model, view)
    return names


def other_linears(view: Checkpoint, linears: Collection[str]) -> list[str]:
    """Modules of all linears whose weights are not among ``linears``, routers of experts too, in the model's order."""
    blocks = StoredBlocks.of(view)
    if blocks is not None:
        modules = [name.removesuffix(".weight") for name in blocks.linears] + ["lm_head"]
    else:
        model = build_skeleton(view, torch.bfloat16)
        modules = _linear_modules(model) + router_modules(model)
    return [name for name in modules if f"{name}.weight" not in linears]


def _linear_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


class StoredBlocks:
    """The decoder blocks of a checkpoint of a known family: their tensors, and nothing to run.

    It stands in for a `StreamedModel` where only weights are looked at.

    Attributes:
        linears: as `linear_weights` gives them.
    """

    def __init__(self, view: Checkpoint, num_blocks: int, shapes: Mapping[str, tuple[int, ...]], device: str):
        self.view = view
        self.device = device
        self.num_blocks = num_blocks
        self._roles = list(shapes)
        linears = [role for role, shape in shapes.items() if len(shape) == 2]
        self.linears = [self.block_prefix(index) + role for index in range(num_blocks) for role in linears]

    @staticmethod
    def of(view: Checkpoint, device: str = "cpu") -> StoredBlocks | None:
        """None where the family is not known here, or has not exactly these tensors."""
        config = view.config
        shapes = _family_shapes(config)
        if shapes is None:
            return None
        num_blocks, width = config["num_hidden_layers"], config["hidden_size"]
        expected = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
        for index in range(num_blocks):
            expected |= {f"model.layers.{index}.{role}": shape for role, shape in shapes.items()}
        found = {name: spec.shape for name, spec in view.specs().items()}
        if not config.get("tie_word_embeddings", False) or "lm_head.weight" in found:
            expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
        if found != expected:
            return None
        return StoredBlocks(view, num_blocks, shapes, device)

    def block_prefix(self, index: int) -> str:
        return f"model.layers.{index}."

    def read_block(self, index: int) -> dict[str, Tensor]:
        """The tensors of one block by their name inside the block, in the view's own dtypes."""
        prefix = self.block_prefix(index)
        return {role: self.view.read(prefix + role, self.device) for role in self._roles}


def _family_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the tensors of one block by their name inside it, linears in the model's order; None = not known."""
    family = config.get("model_type")
    sizes = [config.get(key) for key in _SIZES]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not (
        family in _FAMILIES
        and all(isinstance(size, int) and size > 0 for size in sizes)
        and isinstance(rope, Mapping)
        and _is_usual(config, rope)
    ):
        return None  # or nothing that transformers would take: it says what is wrong
    hidden, inner, _, heads, groups, _ = (int(size) for size in sizes if size is not None)
    width = config.get("head_dim")
    if width is None and (family in ("llama", "mistral") or (family == "qwen2" and "head_dim" not in config)):
        width = hidden // heads  # the default of the others is a number
    if not isinstance(width, int) or width <= 0 or width % 2 or hidden % heads:
        return None
    linears: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (heads * width, hidden),
        "self_attn.k_proj": (groups * width, hidden),
        "self_attn.v_proj": (groups * width, hidden),
        "self_attn.o_proj": (hidden, heads * width),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    names = list(linears)
    biased = names[:3] if family == "qwen2" else []
    if family in ("llama", "qwen3") and config.get("attention_bias"):
        biased = names[:4]
    if family == "llama" and config.get("mlp_bias"):
        biased = biased + names[4:]
    norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    if family == "qwen3":
        norms |= {"self_attn.q_norm": (width,), "self_attn.k_norm": (width,)}
    return {
        **{f"{name}.weight": shape for name, shape in {**linears, **norms}.items()},
        **{f"{name}.bias": linears[name][:1] for name in biased},
    }


def _is_usual(config: Mapping[str, Any], rope: Mapping[str, Any]) -> bool:
    """Whether nothing is out of the ordinary in what transformers looks at beside the sizes."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    pad, vocabulary = config.get("pad_token_id"), config["vocab_size"]
    numbers = [config.get(key, 1.0) for key in ("rms_norm_eps", "attention_dropout", "rope_theta")]
    flags = [config.get(key, False) for key in ("attention_bias", "mlp_bias")]
    return (
        isinstance(kind, str)
        and all(key in rope for key in _ROPE_KEYS.get(kind, ("(not known)",)))
        and config.get("hidden_act", "silu") == "silu"
        and (pad is None or (isinstance(pad, int) and -vocabulary <= pad < vocabulary))
        and all(isinstance(number, int | float) for number in numbers)
        and all(isinstance(flag, bool) for flag in flags)
        and config.keys().isdisjoint(_OTHER_WAYS)
    )


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Parameters that the model shares with another one: name -> source."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    output = model.get_output_embeddings()  # type: ignore[operator]
    source = model.get_input_embeddings()  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    if output is None or id(output) not in names:
        return {}
    return {f"{names[id(output)]}.weight": f"{names[id(source)]}.weight"}


def check_parameters(model: nn.Module, view: Checkpoint, tied: Mapping[str, str]) -> None:
    specs = view.specs()
    parameters = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    _check_names(parameters, model, view)
    for name, parameter in parameters.items():
        if specs[name].shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{view.location}: tensor {name!r} has shape {list(specs[name].shape)}, "
                f"config.json makes it {list(parameter.shape)}"
            )


def _check_names(names: Collection[str], model: nn.Module, view: Checkpoint) -> None:
    specs = view.specs()
    missing = next((name for name in names if name not in specs), None)
    if missing is None:
        return
    config = model.config
    if names_of(view.config) is None and has_experts(specs):
        cause = (
            f"mixtures of experts of model_type {view.config.get('model_type')!r} are not known; known are "
            f"{', '.join(FAMILIES)}"
        )
    elif config.get_text_config(decoder=True) is not config:  # type: ignore[union-attr, operator]
        cause = (
            f"model_type {view.config.get('model_type')!r} is a composite model (text and other parts), "
            "stored under other names than transformers gives its modules"
        )
    else:
        cause = "the checkpoint is incomplete, or stores this architecture under other names than transformers uses"
    raise CheckpointError(
        f"{view.location}: {type(model).__name__} needs tensor {missing!r}, which is not in the checkpoint: {cause}. "
        "Models stored under other names than those of their transformers modules cannot be quantized or validated "
        f"yet. If the files are complete, a plain merge does without: {_PLAIN_MERGE}"
    )
