"""Release candidates that are wrong in one way each, judged as a release is: by the command line, with default gates.

A fault must end with its exit code and be named in the report and on the terminal; a clean artifact of every kind
must pass. Faults that people make with other tools are made with those tools here (transformers, peft).
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv import corpus
from qconv.cli import main
from qconv.report.document import JSON_NAME, MARKDOWN_NAME
from tests.cli_cases import calibrates
from tests.conftest import ALL_LINEARS, TINY_LLAMA, save_bnb

Make = Callable[..., Path]
Edit = Callable[[dict[str, Tensor]], None]
FAILED, BAD_INPUT = 4, 3
RANK, ALPHA = 8, 16
WEAK, USUAL, STRONG = 5e-4, 1e-2, 1e-1  # ||update|| / ||weight||
BLOCK = "model.layers.2."
SHARD_BYTES = 2_000_000
TOKENS = 1024
TARGETS: dict[str, tuple[str, ...]] = {
    "bf16": ("--dtype", "bf16"),
    "fp16": ("--dtype", "fp16"),
    "fp32": ("--dtype", "fp32"),
    "fp8": ("--requant", "fp8"),
    "w4a16": ("--requant", "w4a16"),
    "gptq": ("--requant", "gptq"),
    "awq": ("--requant", "awq"),
}


@dataclass(frozen=True)
class Result:
    code: Any
    out: str
    err: str
    report: Mapping[str, Any] | None = None
    markdown: str = ""

    def findings(self, severity: str = "error") -> dict[str, dict[str, Any]]:
        assert self.report is not None, (self.code, self.err)
        return {f["code"]: f for f in self.report["findings"] if f["severity"] == severity}


def qconv(*arguments: str | Path) -> Result:
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, source in (("calibration", "default"), ("evaluation", "default-eval")):
        (folder / name).with_suffix(".txt").write_text("\n\n".join(corpus.load_documents(source)[:6]))
    return {name: folder / f"{name}.txt" for name in ("calibration", "evaluation")}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``adapter(base, strength=1e-2, seed=0, alpha=16)``: a LoRA adapter, updates of that relative norm."""

    @cache
    def make(model: Path = TINY_LLAMA, strength: float = USUAL, seed: int = 0, alpha: int = ALPHA) -> Path:
        folder = tmp_path_factory.mktemp("adapters")
        save_adapter(folder, model, strength, seed)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "target_modules": ALL_LINEARS}
        config |= {"lora_alpha": alpha, "base_model_name_or_path": str(model)}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make


def save_adapter(folder: Path, model: Path, strength: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, w_NK in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in ALL_LINEARS:
            continue
        a_RK = torch.randn(RANK, w_NK.shape[1], generator=generator)
        b_NR = torch.randn(w_NK.shape[0], RANK, generator=generator)
        norm = torch.linalg.matrix_norm(b_NR @ a_RK) * ALPHA / RANK
        b_NR *= strength * torch.linalg.matrix_norm(w_NK.float()) / norm
        tensors |= {f"base_model.model.{module}.lora_A.weight": a_RK, f"base_model.model.{module}.lora_B.weight": b_NR}
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, texts: Mapping[str, Path]) -> Make:
    """``made("merge", base, adapter, "--dtype", "fp32")``: what that command writes; made once, so never change it."""

    @cache
    def make(command: str, *arguments: str | Path) -> Path:
        out = tmp_path_factory.mktemp("out") / "model"
        options: list[str | Path] = ["-q", "--device", "cpu", "-o", out]
        if command != "convert":
            options.append("--no-validate")
            if calibrates((command, *arguments)):
                options += ["--calibration", texts["calibration"], "--samples", "8", "--seq-len", "128"]
        result = qconv(command, *arguments, *options)
        assert result.code == 0, result.err
        return out

    return make


@pytest.fixture
def validate(tmp_path: Path, texts: Mapping[str, Path]) -> Callable[..., Result]:
    """``validate(reference, adapter, candidate)`` with default gates."""

    def run(reference: Path, adapter: Path | None, candidate: Path | None, *more: str | Path) -> Result:
        models: list[str | Path] = ["--reference", reference]
        models += ["--adapter", adapter] if adapter else []
        models += ["--candidate", candidate] if candidate else []
        report = tmp_path / "report"
        shutil.rmtree(report, ignore_errors=True)
        evaluation: list[str | Path] = [
            "--eval-data",
            texts["evaluation"],
            "--eval-tokens",
            str(TOKENS),
            "--eval-seq-len",
            "128",
        ]
        options = [*evaluation, "--device", "cpu", "-q", "--attribution", "never", "--report", report, *more]
        result = qconv("validate", *models, *options)
        if not (report / JSON_NAME).exists():
            return result
        document = json.loads((report / JSON_NAME).read_text())
        return Result(result.code, result.out, result.err, document, (report / MARKDOWN_NAME).read_text())

    return run


def damaged(source: Path, folder: Path, edit: Edit) -> Path:
    """A copy of a folder with one file of weights, with these edited."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_caught(result: Result, code: str, *words: str) -> dict[str, Any]:
    """The gate on findings failed for this one, which is in the report, its text form and on the terminal."""
    assert result.code == FAILED, (result.code, result.out, result.err)
    assert result.err == "error: a gate failed: see the report\n"
    assert result.report is not None
    assert result.report["verdict"] == "fail"
    assert any("error finding" in reason and "limit 0" in reason for reason in result.report["reasons"])
    found = result.findings()
    assert code in found, found
    finding = found[code]
    for word in words:
        assert word in " ".join([finding["title"], finding["message"], *finding["files"]]), finding
    assert finding["title"] in result.markdown
    assert f"({code})" in result.out
    assert finding["title"] in result.out
    return finding


def assert_clean(result: Result) -> None:
    assert result.code == 0, (result.out, result.err, result.report and result.report["findings"])
    assert result.findings() == {}
    assert result.report is not None
    assert {gate["name"]: gate["verdict"] for gate in result.report["gates"]} == dict.fromkeys(
        ("kl_mean", "merge.kl_mean", "findings"), "pass"
    )


def of_block(tensors: Mapping[str, Tensor], part: str, factor: float, block: str = BLOCK) -> None:
    """Multiplies in place, in the stored dtype."""
    names = [n for n in tensors if n.startswith(block) and n.endswith(part) and "norm" not in n]
    assert len(names) == len(ALL_LINEARS)
    for name in names:
        tensors[name].copy_(tensors[name].float() * factor)


# What is sound passes


@pytest.mark.parametrize("seed", range(20))
def test_clean_merge_passes_on_any_sample(seed: int, validate: Any, made: Make, adapter: Make, tiny_nf4: Path) -> None:
    candidate = made("merge", tiny_nf4, adapter(), *TARGETS["bf16"])
    result = validate(tiny_nf4, adapter(), candidate, "--seed", str(seed))
    assert_clean(result)
    assert result.report["fidelity"]["evaluation"]["seed"] == seed
    assert result.report["findings"] == []


@pytest.mark.parametrize("target", TARGETS)
def test_clean_artifact_of_each_kind_passes(
    target: str, validate: Any, made: Make, adapter: Make, tiny_nf4: Path
) -> None:
    candidate = made("merge", tiny_nf4, adapter(), *TARGETS[target])
    result = validate(tiny_nf4, adapter(), candidate, "--eval-tokens", str(2 * TOKENS))
    assert_clean(result)
    assert result.report["findings"] == []


@pytest.mark.parametrize(
    ("target", "strength", "seed"),
    [
        ("bf16", WEAK, 1), ("bf16", STRONG, 2), ("fp32", WEAK, 3), ("fp8", WEAK, 4), ("fp8", STRONG, 5),
        ("w4a16", STRONG, 6), ("gptq", WEAK, 7), ("awq", WEAK, 8), ("awq", STRONG, 9),
    ],
)  # fmt: skip
def test_clean_artifact_of_weak_and_strong_adapters_passes(
    target: str, strength: float, seed: int, validate: Any, made: Make, adapter: Make, tiny_nf4: Path
) -> None:
    own = adapter(strength=strength, seed=seed)
    result = validate(tiny_nf4, own, made("merge", tiny_nf4, own, *TARGETS[target]))
    assert_clean(result)
    # Storage may round a weak update away; that is said, and is no error.
    assert {f["code"] for f in result.report["findings"]} <= {"adapter-rounded-away", "adapter-not-visible"}
    assert strength == WEAK or not result.report["findings"]


# The weights


@pytest.mark.parametrize(
    ("target", "part", "factor"),
    [
        ("bf16", ".weight", 1.05),
        ("fp8", ".weight_scale", 1.05),
        ("w4a16", ".weight_scale", 1.05),
        ("gptq", ".scales", 1.05),
        ("gptq", ".scales", 0.95),
        ("awq", ".scales", 1.05),
    ],
)
def test_scaled_layer(
    target: str,
    part: str,
    factor: float,
    validate: Any,
    made: Make,
    adapter: Make,
    tiny_nf4: Path,
    tmp_path: Path,
) -> None:
    clean = made("merge", tiny_nf4, adapter(), *TARGETS[target])
    candidate = damaged(clean, tmp_path / "scaled", lambda tensors: of_block(tensors, part, factor))
    finding = assert_caught(validate(tiny_nf4, adapter(), candidate), "weight-scaled", BLOCK.rstrip("."))
    assert all(name.startswith(BLOCK) for name in finding["tensors"])
    found = {name.rsplit(".", 2)[-2] for name in finding["tensors"]}
    # AWQ moves scales from v to o and from up to down: what shows is their product, and the second is named. Beside a
    # norm that was scaled, too, it could as well be the norm that is off, when all behind it are.
    is_folded = target == "awq"
    assert found == (set(ALL_LINEARS) ^ {"v_proj", "up_proj", "input_layernorm"} if is_folded else set(ALL_LINEARS))


@pytest.mark.parametrize("alpha", [2 * ALPHA, ALPHA // 2])
@pytest.mark.parametrize(("target", "strength"), [("bf16", USUAL), ("fp8", USUAL), ("awq", USUAL), ("gptq", STRONG)])
def test_wrong_alpha(
    target: str, strength: float, alpha: int, validate: Any, made: Make, adapter: Make, tiny_nf4: Path
) -> None:
    candidate = made("merge", tiny_nf4, adapter(strength=strength, alpha=alpha), *TARGETS[target])
    result = validate(tiny_nf4, adapter(strength=strength), candidate)
    finding = assert_caught(result, "adapter-scale", "lora_alpha")
    said = float(finding["title"].split("with ")[1].split("x ")[0])
    assert said == pytest.approx(alpha / ALPHA, rel=0.12)


@pytest.mark.parametrize("target", ["bf16", "fp8", "w4a16", "gptq", "awq"])
def test_adapter_not_applied(target: str, validate: Any, made: Make, adapter: Make, tiny_nf4: Path) -> None:
    if target == "bf16":
        candidate = made("convert", tiny_nf4, "--to", "bf16")
    else:
        candidate = made("quantize", tiny_nf4, "--to", target)
    finding = assert_caught(validate(tiny_nf4, adapter(), candidate), "adapter-not-applied")
    assert ("the base's own" in finding["message"]) == (target == "bf16")


def peft_merge(adapter: Path, folder: Path, in_four_bits: bool) -> Path:
    """As people do it: load, merge_and_unload, save. No forward pass before: on CPU it repacks 4-bit weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": "auto"}
    if in_four_bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY_LLAMA, **options), adapter)
    model.merge_and_unload().save_pretrained(folder)
    for file in TINY_LLAMA.glob("tokenizer*.json"):
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["plain", "fp8"])
def test_merged_into_the_original_base(
    target: str, validate: Any, made: Make, adapter: Make, tiny_nf4: Path, tmp_path: Path
) -> None:
    candidate = peft_merge(adapter(), tmp_path / "merged", in_four_bits=False)
    if target == "fp8":
        candidate = made("quantize", candidate, "--to", "fp8")
    finding = assert_caught(validate(tiny_nf4, adapter(), candidate), "wrong-base", "original")
    assert finding["tensors"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stored_as", ["4-bit", "bf16"])
def test_peft_merge_in_four_bits(
    stored_as: str, validate: Any, made: Make, adapter: Make, tiny_nf4: Path, tmp_path: Path
) -> None:
    candidate = peft_merge(adapter(), tmp_path / "merged", in_four_bits=True)
    if stored_as == "bf16":
        candidate = made("convert", candidate, "--to", "bf16")
    result = validate(tiny_nf4, adapter(), candidate)
    assert_caught(result, "adapter-rounded-away", "4-bit grid", "rounded back")


def test_stale_shard(validate: Any, made: Make, adapter: Make, tiny_nf4: Path, tmp_path: Path) -> None:
    shards = ("--dtype", "bf16", "--max-shard-size", str(SHARD_BYTES))
    clean, other = (made("merge", tiny_nf4, adapter(seed=seed), *shards) for seed in (0, 1))
    names = sorted(file.name for file in clean.glob("*.safetensors"))
    assert len(names) > 2
    stale = names[-2]
    candidate = Path(shutil.copytree(clean, tmp_path / "stale"))
    shutil.copyfile(other / stale, candidate / stale)
    result = validate(tiny_nf4, adapter(), candidate)
    found = [f for f in result.findings().values() if stale in f["files"]]
    assert found, result.report["findings"]
    finding = assert_caught(result, found[0]["code"], stale)
    assert finding["files"] == [stale]
    with safe_open(candidate / stale, "pt") as file:
        assert set(finding["tensors"]) <= set(file.keys())
    assert stale in result.markdown


@pytest.mark.parametrize("target", ["bf16", "gptq"])
def test_swapped_tensors(
    target: str,
    validate: Any,
    made: Make,
    adapter: Make,
    square_nf4: Path,
    random_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    own = adapter(random_model("llama", num_key_value_heads=4))
    clean = made("merge", square_nf4, own, *TARGETS[target])
    q, k = (f"model.layers.1.self_attn.{name}" for name in ("q_proj", "k_proj"))

    def swap(tensors: dict[str, Tensor]) -> None:
        for suffix in (".weight", ".qweight", ".scales", ".qzeros"):
            if q + suffix in tensors:
                tensors[q + suffix], tensors[k + suffix] = tensors[k + suffix], tensors[q + suffix]

    assert_clean(validate(square_nf4, own, clean))
    result = validate(square_nf4, own, damaged(clean, tmp_path / "swapped", swap))
    finding = assert_caught(result, "tensors-swapped", f"{q}.weight holds {k}.weight", f"{k}.weight holds {q}.weight")
    assert set(finding["tensors"]) == {f"{q}.weight", f"{k}.weight"}


@pytest.fixture(scope="module")
def square_nf4(tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., Path]) -> Path:
    """A random 4-bit model whose q_proj and k_proj have one shape."""
    folder = tmp_path_factory.mktemp("models") / "square-nf4"
    save_bnb(random_model("llama", num_key_value_heads=4), folder)
    return folder


# Tokenizer and chat template


@pytest.fixture
def copied(made: Make, adapter: Make, tiny_nf4: Path, tmp_path: Path) -> Path:
    """A clean candidate to spoil."""
    return Path(shutil.copytree(made("merge", tiny_nf4, adapter(), *TARGETS["bf16"]), tmp_path / "candidate"))


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_changed_merge(copied: Path, validate: Any, adapter: Make, tiny_nf4: Path) -> None:
    changed: list[Any] = []

    def change(tokenizer: dict[str, Any]) -> None:
        merges = tokenizer["model"]["merges"]
        index = 20
        changed.extend([merges[index], merges[index + 1]])
        merges[index], merges[index + 1] = merges[index + 1], merges[index]

    edit_json(copied / "tokenizer.json", change)
    result = validate(tiny_nf4, adapter(), copied)
    finding = assert_caught(result, "vocabulary-differs", "merge 20 is")
    assert finding["title"] == "the merges differ"
    for merge in changed:
        assert (
            json.dumps(list(merge) if isinstance(merge, list) else merge.split(" "), ensure_ascii=False)
            in finding["message"]
        )
    assert finding["files"] == ["tokenizer.json"]


def test_changed_chat_template(copied: Path, validate: Any, adapter: Make, tiny_nf4: Path, tmp_path: Path) -> None:
    reference = Path(shutil.copytree(tiny_nf4, tmp_path / "reference"))
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    (reference / "chat_template.jinja").write_text(template)
    (copied / "chat_template.jinja").write_text(template.replace("<|{{", "<{{"))
    assert_caught(validate(reference, adapter(), copied), "chat-template-differs", "<|{{ m.role", "<{{ m.role")
    (copied / "chat_template.jinja").unlink()
    assert_caught(validate(reference, adapter(), copied), "chat-template-differs", "is missing")
    (copied / "chat_template.jinja").write_text(template)
    assert_clean(validate(reference, adapter(), copied))


# What cannot be judged is refused


def assert_refused(result: Result, *words: str | Path) -> None:
    assert result.code == BAD_INPUT, (result.code, result.out, result.err)
    assert result.out == ""
    assert result.report is None
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert str(word) in result.err, result.err


@pytest.mark.parametrize("target", ["bf16", "gptq", "fp8"])
def test_nan_in_a_weight(target: str, validate: Any, made: Make, adapter: Make, tiny_nf4: Path, tmp_path: Path) -> None:
    name = f"{BLOCK}mlp.up_proj." + {"bf16": "weight", "gptq": "scales", "fp8": "weight_scale"}[target]

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][1, 0] = float("nan")

    candidate = damaged(made("merge", tiny_nf4, adapter(), *TARGETS[target]), tmp_path / "nan", spoil)
    where = f"{BLOCK}mlp.up_proj"
    assert_refused(validate(tiny_nf4, adapter(), candidate), where)


def test_another_vocabulary(validate: Any, adapter: Make, tiny_nf4: Path, random_model: Callable[..., Path]) -> None:
    other = random_model("llama", num_hidden_layers=4, vocab_size=3000)
    assert_refused(validate(tiny_nf4, adapter(), other), other, "3000", "2048")


@pytest.mark.parametrize("text", ["", " \n\n \n"])
def test_empty_text(text: str, copied: Path, validate: Any, adapter: Make, tiny_nf4: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(text)
    assert_refused(validate(tiny_nf4, adapter(), copied, "--eval-data", empty), empty)


def test_truncated_weights(copied: Path, validate: Any, adapter: Make, tiny_nf4: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused(validate(tiny_nf4, adapter(), copied), file)


def test_reference_cache(copied: Path, validate: Any, adapter: Make, tiny_nf4: Path, tmp_path: Path) -> None:
    cache_file = tmp_path / "reference.qcache"
    use = ("--reference-cache", cache_file)
    assert validate(tiny_nf4, adapter(), None, *use).code == 0
    assert_clean_from_cache(validate(tiny_nf4, adapter(), copied, *use))
    other = adapter(seed=1)
    assert_refused(validate(tiny_nf4, other, copied, *use), "reference cache", "adapter_model.safetensors")
    content = cache_file.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 100):
        cache_file.write_bytes(content[:size])
        assert_refused(validate(tiny_nf4, adapter(), copied, *use), cache_file)
    spoiled = bytearray(content)
    spoiled[len(content) // 2] ^= 1
    cache_file.write_bytes(spoiled)
    assert_refused(validate(tiny_nf4, adapter(), copied, *use), cache_file)


def assert_clean_from_cache(result: Result) -> None:
    assert result.code == 0, (result.out, result.err)
    assert result.findings() == {}
