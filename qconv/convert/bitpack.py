"""Dense packing of small unsigned integers into int32 words, low bits first.

Element i of a row occupies bits ``i * bits`` up to ``(i + 1) * bits`` of the row's little-endian bit
stream, so 3-bit elements cross word borders (10, 1, 10, 1, 10 of them per three words). GPTQ, AWQ
and compressed-tensors all store this stream; they differ in the axis and in the order of elements.
There are no data-dependent branches: everything runs on meta tensors, and on any device.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

if sys.byteorder != "little":
    raise ImportError("qconv packs words through their bytes and runs on little-endian machines only")


def elements_per_unit(bits: int) -> int:
    """The fewest elements that fill whole int32 words: 16, 32, 8, 32, 16, 4 for 2, 3, 4, 5, 6, 8 bits."""
    return 32 // math.gcd(32, bits)


def num_words(count: int, bits: int) -> int:
    """int32 words that hold ``count`` elements."""
    return -(-count * bits // 32)


def pack_last(values: Tensor, bits: int) -> Tensor:
    """uint8 ``values`` [..., count] below ``2**bits`` -> int32 [..., ceil(count * bits / 32)].

    Bits beyond the last element are zero.
    """
    count = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, -count % elements_per_unit(bits))).contiguous()
    if bits == 8:
        stream = padded
    elif bits in (3, 5, 6):  # eight elements lie in as many bytes as they have bits
        eights = padded.reshape(*padded.shape[:-1], -1, 8)
        joined = eights[..., 0].to(torch.int64)
        for i in range(1, 8):
            joined |= eights[..., i].to(torch.int64) << (i * bits)
        stream = joined.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    else:
        groups = padded.reshape(*padded.shape[:-1], -1, 8 // bits)
        stream = groups[..., 0]
        for i in range(1, 8 // bits):
            stream = stream | (groups[..., i] << (i * bits))
    # Through one dimension: a tensor of one row may have strides that refuse a wider dtype.
    words = stream.reshape(-1).contiguous().view(torch.int32).view(*values.shape[:-1], -1)
    return words[..., : num_words(count, bits)].contiguous()


def unpack_last(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_last`: int32 [..., words] -> uint8 [..., count]."""
    stream = words.reshape(-1).contiguous().view(torch.uint8).view(*words.shape[:-1], -1)
    mask = 2**bits - 1
    if bits == 8:
        values = stream
    elif bits in (3, 5, 6):
        # A row may end inside a run of so many bytes; the missing ones hold no element.
        padded = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % bits))
        eights = torch.nn.functional.pad(padded.reshape(*padded.shape[:-1], -1, bits), (0, 8 - bits))
        joined = eights.contiguous().view(torch.int64)[..., 0]
        values = torch.stack([((joined >> (i * bits)) & mask).to(torch.uint8) for i in range(8)], dim=-1).flatten(-2)
    else:
        values = torch.stack([(stream >> shift) & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)
    return values[..., :count].contiguous()
