"""A peft config for every kind that is merged, small enough for the tiny models."""

from __future__ import annotations

from typing import Any

LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name -> (config class of peft, its arguments)
KIND_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLoraConfig", {"init_r": 6, "target_r": 4, "total_step": 10, "lora_alpha": 12}),
    "loha": (
        "LoHaConfig",
        {"r": 3, "alpha": 5, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 9}},
    ),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 5}),
    "lokr-both": ("LoKrConfig", {"r": 2, "alpha": 5, "decompose_both": True}),
    "lokr-factor": ("LoKrConfig", {"r": 3, "decompose_factor": 4}),
    "lokr-whole": ("LoKrConfig", {"r": 64}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj", "o_proj"]}),
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "oft-cayley": ("OFTConfig", {"oft_block_size": 16, "use_cayley_neumann": False}),
    "oft-blocks": ("OFTConfig", {"r": 4, "oft_block_size": 0, "num_cayley_neumann_terms": 3}),
    "oft-shared-coft": ("OFTConfig", {"oft_block_size": 8, "block_share": True, "coft": True, "eps": 0.05}),
    "boft": ("BOFTConfig", {"boft_block_size": 8}),
    "boft-blocks": ("BOFTConfig", {"boft_block_size": 0, "boft_block_num": 4}),
    "hra": ("HRAConfig", {"r": 5}),
    "hra-gs": ("HRAConfig", {"r": 4, "apply_GS": True}),
    "vera": ("VeraConfig", {"r": 8, "save_projection": True}),
    "randlora": ("RandLoraConfig", {"r": 24, "randlora_alpha": 48}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 60, "scaling": 100.0, "n_frequency_pattern": {"k_proj": 30}}),
    "c3a": ("C3AConfig", {"block_size": 16}),
    "miss": ("MissConfig", {"r": 6}),
    "miss-bat": ("MissConfig", {"r": 8, "init_weights": "bat"}),
    "miss-mini": ("MissConfig", {"r": 8, "init_weights": "mini", "mini_r": 4}),
    "shira": ("ShiraConfig", {"r": 3}),
    "hira": ("HiraConfig", {"r": 4, "rank_pattern": {"v_proj": 2}}),
    "delora": ("DeloraConfig", {"r": 4, "rank_pattern": {"v_proj": 2}}),
    "road-1": ("RoadConfig", {"variant": "road_1", "group_size": 16}),
    "road-2": ("RoadConfig", {"variant": "road_2", "group_size": 16}),
    "road-4": ("RoadConfig", {"variant": "road_4", "group_size": 16}),
}
