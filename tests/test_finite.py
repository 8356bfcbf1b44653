"""Checks that are put off are done, in the end, and say what they would have said at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch

from qconv.convert import FORMATS
from qconv.errors import NumericsError
from qconv.finite import put_off, putting_off, settle, settle_before
from qconv.merge import merge, merged_weight
from qconv.quantize.rtn import rtn
from qconv.types import Adapter, LoraDelta, Scheme
from tests.merge_cases import TensorsInMemory

YES, NO = torch.tensor(True), torch.tensor(False)


def failing(message: str, done: list[str]) -> Callable[[], None]:
    def check() -> None:
        done.append(message)
        raise NumericsError(message)

    return check


def test_outside_nothing_is_put_off() -> None:
    assert not put_off(NO, lambda: None)
    with putting_off():
        pass
    assert not put_off(NO, lambda: None)


def test_only_doubts_are_checked_and_only_when_they_are_settled() -> None:
    done: list[str] = []
    with putting_off():
        assert put_off(YES, failing("fine", done))
        assert put_off(NO, lambda: done.append("looked"))  # as where a sum overflowed, and nothing else
        assert done == []
        settle()
        assert done == ["looked"]
        settle()
        assert done == ["looked"]
        assert put_off(NO, failing("last", done))
        with pytest.raises(NumericsError, match="last"):
            settle()


def test_settling_what_was_before_leaves_the_last_ones_for_later() -> None:
    done: list[str] = []
    with putting_off():
        put_off(NO, lambda: done.append("first"))
        settle_before()
        assert done == []
        put_off(NO, lambda: done.append("second"))
        settle_before()
        assert done == ["first"]
        put_off(NO, failing("third", done))
        with pytest.raises(NumericsError, match="third"):
            settle()
        assert done == ["first", "second", "third"]
    with pytest.raises(NumericsError, match="weight"), putting_off():
        put_off(NO, failing("weight", []))
        settle_before()
        raise NumericsError("activations")
    with pytest.raises(NumericsError, match="weight"), putting_off():
        put_off(NO, failing("weight", []))
        settle_before()


def test_the_end_settles() -> None:
    with pytest.raises(NumericsError, match="weight"), putting_off():
        put_off(NO, failing("weight", []))


def test_an_error_of_numbers_gives_way_to_its_cause_and_others_do_not() -> None:
    with pytest.raises(NumericsError, match="weight"), putting_off():
        put_off(NO, failing("weight", []))
        raise NumericsError("activations")
    with pytest.raises(NumericsError, match="activations"), putting_off():
        put_off(YES, failing("weight", []))
        raise NumericsError("activations")
    with pytest.raises(KeyError), putting_off():
        put_off(NO, failing("weight", []))
        raise KeyError
    assert not put_off(NO, lambda: None)


def test_what_is_checked_in_the_end_is_checked_at_once() -> None:
    done: list[bool] = []
    with putting_off():
        put_off(NO, lambda: done.append(put_off(NO, lambda: None)))
    assert done == [False]


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), r"'x\.weight'.*base weight has them already"), (3e38, None)]
)
def test_a_merged_weight_names_itself_in_the_end(value: float, message: str | None) -> None:
    """Several values of 3e38 are finite, and their sum is not."""
    weight = torch.ones(3, 4)
    weight[2, :] = value
    base = TensorsInMemory({"x.weight": weight})
    delta = LoraDelta(weight="x.weight", a="a", b="b", rank=1, scaling=1.0)
    adapter = Adapter(
        tensors=TensorsInMemory({"a": torch.ones(1, 4), "b": torch.ones(3, 1)}),
        deltas={"x.weight": delta},
        replacements={},
    )
    if message is None:
        with putting_off():
            found = merge(base, [adapter]).read("x.weight")
        assert torch.equal(found, merged_weight(weight, adapter, delta))
        return
    reached = False
    with pytest.raises(NumericsError, match=message), putting_off():
        merge(base, [adapter]).read("x.weight")
        reached = True
    assert reached


def test_what_is_put_off_holds_no_tensor() -> None:
    """A checkpoint's tensors are dropped after each block, whether or not their check was done."""
    scheme = Scheme(bits=4, group_size=32)
    linear = rtn(torch.randn(16, 64), scheme, "x")
    tensors = FORMATS["awq"].pack(linear, "x", torch.float16)
    kept = [weakref.ref(tensor) for tensor in tensors.values()]
    with putting_off():
        found = FORMATS["awq"].unpack(tensors, "x", scheme)
        del tensors
        assert [ref() for ref in kept] == [None] * 3
        assert torch.equal(found.codes_NK, linear.codes_NK)
