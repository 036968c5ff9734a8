"""The ways to combine adapters, a record each. A new one is a function in a file of its own and a line here.

Interface of the entrywise ones (pure functions of `entrywise.py` and `knots.py`): deltas is [n, out, in] in fp32, one
module's ΔW of every source (zeros where a source leaves the module alone); what they give is [out, in], before λ. What
drops at random comes from one generator for each source (`masks.py`: of the seed, the module's path and the source's
content).

    ties(deltas, weights, density, convention)
    dare(deltas, weights, density, generators)
    dare_ties(deltas, weights, density, convention, generators)
    magnitude_prune(deltas, weights, density)
    della(deltas, weights, density, epsilon, convention, generators)
    breadcrumbs(deltas, weights, density, gamma)
    knots(deltas, weights, density, convention)
    masks.generator(seed: int, path: str, content: str) -> torch.Generator
    truncate.truncated(dense [out, in], r) -> (b [out, r], a [r, in], discarded: ‖M‖² - Σ kept σ², not relative)
"""
