"""Spec -> the functions that kernels call for its score program and its masks, in the language of the kernels.

What is said is here: which steps in which order, where sums are joined and rounded, which factor is left over, what masks cut off,
their bounds on a tile, what backward needs, which operands get which gradients. How it is written is a `Dialect`: tiles in Triton
(kernels/triton/codegen.py), one score in CUDA C++ (kernels/volta/codegen.py). The functions:

    score        the scores after all steps, and what their gradients need
    score_grad   gradient of the scores before all steps; gives those of operands
    weigh        the weights after their steps
    weigh_grad   gradient of the weights before their steps; gives those of operands
    sink         the score that each row has besides those of the keys
    left         which weights their fills leave
    keys         the keys that queries q0 to q1 may see, and those that all of them see
    queries      the queries that may see keys k0 to k1, and those that see all of them
    seen         whether a tile may hold a key that is not hidden, and whether it surely holds no other by what is no bound

FULL tells what hides nothing of a tile, and need not be compared: 1 bounds on the key, 2 also what `seen` looks at. All keys of
such a tile exist, and where the spec is not ragged all queries. Nothing but integers, finite numbers, and names that are made here
gets into the text.
"""
