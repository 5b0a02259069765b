"""Posterior of each row of a ragged list of log weights: total, maximum, and the smallest set that carries a fraction.

One program works on one row and reads it a few times; nothing is sorted.
"""

import triton
import triton.language as tl


@triton.jit
def posterior_kernel(
    log_weights, first, kept, top, log_total, best, fraction, deepest,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, EDGES: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Write each entry's probability, 0 below the row's threshold; `deepest` nats under the maximum nothing counts.

    The threshold is the largest value v with S(v) > fraction * total, S(v) being the sum of what is not below v. Each
    pass divides the interval that holds it by EDGES.
    """
    row = tl.program_id(0)
    start = tl.load(first + row)
    count = tl.load(first + row + 1) - start
    values = log_weights + start
    lane = tl.arange(0, BLOCK)

    # maximum and its first place, a running one in every lane
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int64)
    for begin in range(0, count, BLOCK):
        value = tl.load(values + begin + lane, mask=begin + lane < count, other=-float("inf"))
        place = tl.where(value > most, begin + lane, place)
        most = tl.maximum(most, value)
    maximum = tl.max(most, 0)
    tl.store(top + row, maximum)
    tl.store(best + row, start + tl.min(tl.where(most == maximum, place, count), 0))

    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, count, BLOCK):
        value = tl.load(values + begin + lane, mask=begin + lane < count, other=-float("inf"))
        total += tl.exp(value - maximum).to(tl.float64)
    whole = tl.sum(total, 0)
    log_whole = maximum.to(tl.float64) + tl.log(whole)
    tl.store(log_total + row, log_whole)

    # S(low) > wanted >= S(high)
    wanted = whole * fraction
    low = -tl.load(deepest + row)
    width = -low * 1.0000001
    edge = tl.arange(0, EDGES)
    for _ in range(PASSES):
        width = width / EDGES
        reached = tl.zeros((BLOCK, EDGES), tl.float64)
        for chunk in range(0, count, BLOCK * CHUNK):
            # few enough for single precision, whose sums cost an eighth
            some = tl.zeros((BLOCK, EDGES), tl.float32)
            for begin in range(chunk, tl.minimum(chunk + BLOCK * CHUNK, count), BLOCK):
                value = tl.load(values + begin + lane, mask=begin + lane < count, other=-float("inf")) - maximum
                above = value[:, None] >= low + width * edge[None, :]
                some += tl.where(above, tl.exp(value)[:, None], 0.0)
            reached += some.to(tl.float64)
        low += width * (tl.sum((tl.sum(reached, 0) > wanted).to(tl.int32), 0) - 1)

    shift = (log_whole - maximum.to(tl.float64)).to(tl.float32)
    for begin in range(0, count, BLOCK):
        value = tl.load(values + begin + lane, mask=begin + lane < count, other=-float("inf")) - maximum
        probability = tl.where(value >= low, tl.exp(value - shift), 0.0)
        tl.store(kept + start + begin + lane, probability, mask=begin + lane < count)
