"""The table of peft's own configurations: what makes it, and whether it says what the code says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qconv.merge.kinds import KINDS, LOW_RANK, WHOLE
from qconv.merge.kinds.refused import REFUSED

peft = pytest.importorskip("peft")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peft_configurations

    return peft_configurations


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin0, self.conv2d, self.lin1 = nn.Linear(10, 16), nn.Conv2d(1, 4, 2), nn.Linear(36, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.lin1(self.conv2d(self.lin0(x).view(-1, 1, 4, 4)).flatten(1))
        return result


def run(table: ModuleType, config_class: Any, **options: Any) -> str:
    torch.manual_seed(1)
    inputs = {"x": torch.randn(3, 10)}
    result: str = table.outcome(Small(), config_class, options, inputs, lambda _, options: options)
    return result


def test_outcomes(table: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    lora, both = {"target_modules": ["lin0", "lin1"]}, {"target_modules": ["conv2d", "lin0"]}
    assert run(table, peft.LoraConfig, **lora) == "merged"
    assert run(table, peft.GraloraConfig, **lora, r=4) == "merged"
    assert run(table, peft.C3AConfig, **lora, block_size=7).startswith("peft: ")
    for config_class in (peft.LoraConfig, peft.LoHaConfig, peft.IA3Config, peft.HiraConfig):
        more = {"feedforward_modules": []} if config_class is peft.IA3Config else {}
        assert table.reason_of(run(table, config_class, **both, **more)) == "convolutions"
    assert table.reason_of(run(table, peft.PsoftConfig, **lora, r=2)) == "the kind"
    monkeypatch.setattr(table, "merge", lambda base, adapters: base)
    assert run(table, peft.LoraConfig, **lora).startswith("WRONG")


def test_rows(table: ModuleType) -> None:
    outcomes = Counter({"merged": 3, "refused: adapter_config.json: use_bdlora is set (1), which": 2, "peft: no": 1})
    assert list(table.table_of({"LORA": outcomes}))[2:] == ["| `LORA` | 3 | 2 (`use_bdlora`) | 1 |"]
    bare = Counter({"refused: /x/adapter_model.safetensors: target_parameters is set (lin0.weight): LoRA on": 2})
    assert list(table.table_of({"LORA": bare}))[2:] == ["| `LORA` |  | 2 (`target_parameters`) |  |"]


def test_the_documented_table_agrees_with_the_kinds() -> None:
    """Merged kinds have merged configurations; refused ones have none, and say that the kind is refused."""
    part = (ROOT / "docs" / "adapters.md").read_text().split("## peft's own list")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| `")]
    assert rows[0][0] == "`peft_type`"
    merged = {*LOW_RANK, *WHOLE, *KINDS}
    for name, count, refused, _ in rows[1:]:
        kind = name.strip("`")
        assert kind in merged | REFUSED.keys()
        assert ("(the kind)" in refused) is (kind in REFUSED), kind
        assert bool(count) is (kind in merged and kind != "UNILORA"), kind  # of which the list saves no indices
    not_in_the_list = {"BONE", "CARTRIDGE", "XLORA", "POLY", "SHADOW", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT"}
    not_in_the_list |= {"BOTTLENECK"}  # of LLM-Adapters, a fork of peft
    assert merged | REFUSED.keys() == {row[0].strip("`") for row in rows[1:]} | not_in_the_list
