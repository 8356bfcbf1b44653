"""Statistics of experts that few calibration tokens chose.

The Gram matrix of a linear with K inputs has full rank only from K tokens on. With fewer, GPTQ would let errors in
directions that it has not seen make up for those in directions that it has, and AWQ would scale by a handful of tokens.
Such an expert is given all tokens of its layer once more, and its statistics are those of its own n tokens, filled up
to K by these: ``n / K * own + (1 - n / K) * all``. An expert that nobody chose is so calibrated on the layer's tokens,
one with K tokens or more on its own alone, and nothing jumps between. Its down projection sees what the expert itself
makes of those tokens: statistics pooled over experts would be of no use to it, since the inner features of one expert
are not those of another.

Legend: K = in features, n = tokens that chose the expert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from qconv.experts import ExpertLinear, expert_of
from qconv.quantize.fold_block import Statistics


def with_few_tokens(names: Iterable[str], own: Mapping[str, Statistics], inputs: Mapping[str, int]) -> list[str]:
    """Weights of experts' linears that saw fewer tokens than they have inputs; ``inputs``: K of each."""
    return [name for name in names if _expert(name) and (name not in own or own[name].num_tokens < inputs[name])]


def experts_of(names: Iterable[str]) -> dict[str, frozenset[int]]:
    """Module of experts -> the numbers of those whose linears are named."""
    found: dict[str, set[int]] = defaultdict(set)
    for name in names:
        expert = _expert(name)
        if expert is not None:
            found[expert.experts].add(expert.number)
    return {module: frozenset(numbers) for module, numbers in found.items()}


def filled_up(
    own: Mapping[str, Statistics], of_all: Mapping[str, Statistics], inputs: Mapping[str, int]
) -> dict[str, Statistics]:
    """Statistics for the weights in ``of_all``; one object for the linears of one expert that share an input.

    Those in ``own`` are used up.
    """
    done: dict[tuple[str, int, int], Statistics] = {}
    result = {}
    for name, all_tokens in of_all.items():
        expert = _expert(name)
        assert expert is not None
        key = (expert.experts, expert.number, id(all_tokens))
        if key not in done:
            done[key] = _mixed(own.get(name), all_tokens, inputs[name])
        result[name] = done[key]
    return result


def tokens_of_experts(statistics: Mapping[str, Statistics], names: Iterable[str]) -> dict[str, list[int]]:
    """Module of experts -> tokens that chose each, by number."""
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for name in names:
        expert = _expert(name)
        if expert is not None:
            found[expert.experts][expert.number] = statistics[name].num_tokens
    return {module: [by_number[number] for number in sorted(by_number)] for module, by_number in found.items()}


def _expert(weight: str) -> ExpertLinear | None:
    return expert_of(weight.removesuffix(".weight"))


def _mixed(own: Statistics | None, of_all: Statistics, num_inputs: int) -> Statistics:
    if own is None:
        return Statistics(gram_KK=of_all.gram_KK, mean_abs_K=of_all.mean_abs_K, sample=of_all.sample)
    share = own.num_tokens / num_inputs
    gram_KK = mean_abs_K = None
    if own.gram_KK is not None and of_all.gram_KK is not None:
        gram_KK = own.gram_KK.mul_(share).add_(of_all.gram_KK, alpha=1 - share)
    if own.mean_abs_K is not None and of_all.mean_abs_K is not None:
        mean_abs_K = share * own.mean_abs_K + (1 - share) * of_all.mean_abs_K
    # The expert's own tokens are among all of them, the largest magnitudes too.
    return Statistics(gram_KK=gram_KK, mean_abs_K=mean_abs_K, sample=of_all.sample, num_tokens=own.num_tokens)
