"""WaveFT: an update that is the inverse wavelet transform of a few trained coefficients.

Method: WaveFT (Bilican et al. 2025). The coefficients lie at places that a seed gives (torch's CPU generator, the same
everywhere). One level of the inverse transform makes them a matrix: each of four quarters, upsampled by 2, is filtered
along rows and columns by the low or the high pass of an orthogonal wavelet, whose high pass is
``g[i] = (-1)^i h[F - 1 - i]`` (Daubechies 1992). What runs over the border is cut off, the same on both sides. Without
the transform the coefficients are the update.

The taps of ``db1`` (Haar), peft's default, are known here; those of other wavelets are read from peft.

Dimensions: F = taps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qconv.merge.kinds.kind import Kind, Layer, Parts, Settings
from qconv.own_process import importing_libraries


def _check(layer: Layer) -> Settings:
    (count,) = layer.shape("waveft_spectrum", 1)
    if not layer.read.flag("proportional_parameters"):  # which depend on the sizes of all layers
        layer.expect("waveft_spectrum", layer.rank)
    if count > layer.n * layer.k:
        layer.refuse(f"has {count} coefficients for a weight [{layer.n}, {layer.k}]")
    return {
        "scaling": layer.read.number("scaling"),
        "seed": layer.read.whole("random_loc_seed"),
        "taps": _taps(layer) if layer.read.flag("use_idwt") else None,
    }


def _taps(layer: Layer) -> list[float]:
    family = layer.read.config.get("wavelet_family")
    if family == "db1":
        return [math.sqrt(0.5)] * 2
    try:
        with importing_libraries():
            from peft.tuners.waveft.wavelet import Wavelet
    except ImportError:
        layer.refuse(f"uses the wavelet {family!r}, whose taps are read from peft: pip install peft")
    try:
        return list(Wavelet(family).rec_lo)
    except (ValueError, AttributeError):
        layer.read.refuse("wavelet_family", "a wavelet that peft knows")


def _waveft(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    values, (n, k), taps = parts["waveft_spectrum"], w_NK.shape, settings["taps"]
    generator = torch.Generator().manual_seed(settings["seed"])
    places = torch.randperm(n * k, generator=generator)[: len(values)].to(w_NK.device)
    spare = 0 if taps is None else len(taps) - 2
    height, width = (size + spare + (0 if taps is None else (size + spare) % 2) for size in (n, k))
    spectrum = w_NK.new_zeros(height, width)
    spectrum[places // k + (height - n) // 2, places % k + (width - k) // 2] = values
    if taps is None:
        update = spectrum
    else:  # in float64: a GPU's convolutions take float32 for TF32
        update = _inverse(spectrum.double(), torch.tensor(taps, dtype=torch.float64, device=w_NK.device)).to(w_NK)
    top, left = (update.shape[0] - n) // 2, (update.shape[1] - k) // 2
    return w_NK + update[top : top + n, left : left + k] * float(settings["scaling"])


def _inverse(spectrum: Tensor, low_F: Tensor) -> Tensor:
    signs_F = 1 - 2 * (torch.arange(len(low_F), device=low_F.device) % 2)
    high_F = signs_F * low_F.flip(0)
    half, middle = spectrum.shape[0] // 2, spectrum.shape[1] // 2
    quarters = [spectrum[:half, :middle], spectrum[:half, middle:], spectrum[half:, :middle], spectrum[half:, middle:]]
    filters = [torch.outer(down, across) for across in (low_F, high_F) for down in (low_F, high_F)]
    border = len(low_F) - 2
    result: Tensor = torch.nn.functional.conv_transpose2d(
        torch.stack(quarters)[None], torch.stack(filters)[:, None], stride=2, padding=border
    )
    return result[0, 0]


WAVEFT = Kind(
    peft_type="WAVEFT",
    title="WaveFT (Bilican et al. 2025)",
    parts=frozenset({"waveft_spectrum"}),
    check=_check,
    merged=_waveft,
    keys=frozenset(
        {
            "n_frequency",
            "n_frequency_pattern",
            "proportional_parameters",
            "random_loc_seed",
            "scaling",
            "use_idwt",
            "wavelet_family",
        }
    ),
    vanishing=frozenset({"waveft_spectrum"}),
    rank_key="n_frequency",
    rank_pattern="n_frequency_pattern",
)
