"""Intruder dimensions: planted ones are found, in numpy's singular vectors, and a change along W's own is none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qconv.checkpoint import open_checkpoint
from qconv.cli import main
from qconv.merge import leading_vectors, load_adapter, merge
from qconv.merge.spectrum import find_intruders, intruding_components, spectrum_changes
from tests.merge_cases import TINY_LLAMA, llama, trained


def decomposed(shape: tuple[int, int] = (40, 30)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, singular values and V of a weight that uses 20 of its directions."""
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(shape[0], shape[0]))
    v, _ = torch.linalg.qr(torch.randn(shape[1], shape[1]))
    return u, torch.linspace(10, 1, 20), v


def test_a_direction_that_the_weight_lacks_is_an_intruder() -> None:
    u, s, v = decomposed((40, 20))
    w = u[:, :20] * s @ v.T
    after = w + 20 * torch.outer(u[:, 30], v[:, 5])
    found = find_intruders(w, after)
    assert [one.place for one in found] == [0]
    own = float(s[5])  # the one direction of W that it is mixed with
    assert found[0].cosine == pytest.approx(own / np.hypot(own, 20), rel=1e-4)
    assert found[0].singular_value == pytest.approx(np.linalg.svd(after.numpy())[1][0])


def test_a_change_along_its_own_directions_is_none() -> None:
    u, s, v = decomposed((40, 20))
    w = u[:, :20] * s @ v.T
    assert find_intruders(w, w + 12 * torch.outer(u[:, 7], v[:, 7])) == []
    assert find_intruders(w, w) == []


@pytest.mark.parametrize("shape", [(320, 700), (700, 320), (300, 300)])
@pytest.mark.parametrize("strength", [0.0, 0.1, 3.0])
def test_subspaces_say_what_numpy_says(
    shape: tuple[int, int], strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights so large that they are not decomposed whole at once."""
    made = torch.Generator().manual_seed(int(10 * strength))
    side = min(shape)
    u = torch.linalg.qr(torch.randn(shape[0], side, generator=made))[0]
    v = torch.linalg.qr(torch.randn(shape[1], side, generator=made))[0]
    w = u * torch.arange(1.0, side + 1) ** -0.5 @ v.T
    update = torch.randn(shape[0], 4, generator=made) @ torch.randn(4, shape[1], generator=made)
    after = w + strength * update / torch.linalg.matrix_norm(update, 2)
    whole = []
    monkeypatch.setattr(
        leading_vectors, "_whole", lambda w_NK, own=leading_vectors._whole: whole.append(1) or own(w_NK)
    )
    found, left, right = intruding_components(w, after)
    own = np.linalg.svd(w.double().numpy())[0][:, :side]
    left_after, s_after, right_after = np.linalg.svd(after.double().numpy(), full_matrices=False)
    nearest = np.abs(own.T @ left_after[:, :10]).max(axis=0)
    foreign = np.flatnonzero(nearest < 0.5)
    assert [one.place for one in found] == list(foreign)
    assert [one.cosine for one in found] == pytest.approx(nearest[foreign], abs=5e-3)
    assert [one.singular_value for one in found] == pytest.approx(s_after[foreign], rel=1e-5)
    components = left_after[:, foreign] * s_after[foreign] @ right_after[foreign]
    sizes = torch.tensor([one.singular_value for one in found])
    np.testing.assert_allclose((left * sizes @ right).numpy(), components, atol=2e-3 * s_after[0])
    assert (len(foreign) > 0) == (strength == 3)
    assert len(whole) == (strength == 3), "only what no subspace decides is decomposed whole"


def test_every_weight_against_numpy(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    trained(llama(), target_modules=["k_proj"], lora_alpha=400).save_pretrained(str(tmp_path / "adapter"))
    base = open_checkpoint(TINY_LLAMA)
    adapter = load_adapter(tmp_path / "adapter", base)
    merged, count = merge(base, [adapter]), 0
    changes = list(spectrum_changes(base, adapter))
    assert len(changes) == 4
    for change in changes:
        name = change.module + ".weight"
        w, after = base.read(name).double().numpy(), merged.read(name).double().numpy()
        u, s, _ = np.linalg.svd(w, full_matrices=False)
        u_after, s_after, _ = np.linalg.svd(after, full_matrices=False)
        nearest = np.abs(u.T @ u_after[:, :10]).max(axis=0)
        assert [one.place for one in change.intruders] == list(np.flatnonzero(nearest < 0.5))
        assert [one.cosine for one in change.intruders] == pytest.approx(nearest[nearest < 0.5], abs=1e-3)
        assert (change.largest_before, change.largest_after) == pytest.approx((s[0], s_after[0]), rel=1e-4)
        assert change.change == pytest.approx(np.linalg.norm(after - w) / np.linalg.norm(w), rel=1e-4)
        count += len(change.intruders)
    assert count > 0, "so large an update must have some"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    adapter = tmp_path / "adapter"
    trained(llama(), target_modules=["k_proj"], lora_alpha=400).save_pretrained(str(adapter))
    arguments = ["inspect", str(adapter), "--base", str(TINY_LLAMA), "--spectral", "--trained-on", "16bit"]
    main([*arguments, "--device", "cpu", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["intruder dimensions"] == sum(len(row["intruders"]) for row in document["spectrum"]) > 0
    page = tmp_path / "spectrum.html"
    main([*arguments, "--device", "cpu", "--plot", str(page)])
    assert "model.layers.0.self_attn.k_proj  changed by" in capsys.readouterr().out
    text = page.read_text()
    first = next(row for row in document["spectrum"] if row["intruders"])
    assert text.count("<svg") == 2
    assert f"<title>{first['module']}: place {first['intruders'][0]['place'] + 1} (cosine " in text
    assert text.count("<tr>") == 1 + document["intruder dimensions"]
    assert "<script" not in text
    with pytest.raises(SystemExit):
        main([*arguments, "--plot", str(tmp_path / "spectrum.png")])
    assert "a name that ends in .html" in capsys.readouterr().err
    for odd in (["--spectral"], ["--base", "x"], ["--device", "cpu"], ["--plot", "x.html"]):
        with pytest.raises(SystemExit) as raised:
            main(["inspect", str(adapter), *odd])
        assert raised.value.code == 2
