"""
How long it takes to deal an epoch of a large data set, and how level the ranks are then. No GPU, no data: lengths alone.

    python benchmarks/planning.py --samples 1000000 --ranks 4 --batch 16
"""

import argparse
import time

import numpy as np

from accelerate_unsloth.data.packing import RowCost
from accelerate_unsloth.data.sampler import EffectiveBatchSampler

TOKEN_BUDGET = 27_870  # of a micro-batch, as on an H200 with 8B dims in 4 bits
LOOKED_AT = 500  # steps whose imbalance is counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    drawn = np.random.default_rng(0).lognormal(5.7, 1.0, options.samples)  # some 430 tokens on average, a long tail
    sampler = EffectiveBatchSampler(
        options.samples,
        world_size=options.ranks,
        rank=0,
        micro_batch=options.batch,
        accumulation=1,
        seed=0,
        lengths=np.clip(drawn, 16, 2048).astype(np.int32),
        balance=True,
        cost=RowCost(attention_per_token=1e-5),
    )
    sampler.token_budget = TOKEN_BUDGET
    began_s = time.perf_counter()
    steps = sum(1 for _ in sampler)
    dealt_s = time.perf_counter() - began_s
    imbalances = []
    for step in range(0, sampler.num_steps, max(1, sampler.num_steps // LOOKED_AT)):
        tokens = [sum(int(sampler.lengths[batch].sum()) for batch in batches) for batches in sampler.plan(step)]
        imbalances.append(max(tokens) * options.ranks / sum(tokens))
    print(f"{options.samples:,} samples in {steps:,} steps of {options.ranks} ranks dealt in {dealt_s:.1f} s")
    print(f"most tokens of a rank over the mean: {np.mean(imbalances):.3f} on average, {max(imbalances):.3f} at most")


if __name__ == "__main__":
    main()
