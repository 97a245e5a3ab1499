"""How many attentions of real model implementations are found and fused, beside Inductor's own count.

python -m benchmarks.coverage list  [--filter RE]
python -m benchmarks.coverage run   [--filter RE] [--jobs 2] [--out FILE]
python -m benchmarks.coverage table [--results FILE]

cases     the models: transformers, timm, diffusers, x-transformers and plain PyTorch, tiny, with random weights
trace     an eager call as a list of the ATen operations it ran
sites     the attentions in such a list, counted without any of attnfuse's passes
measure   one case: eager, then compiled by attnfuse, in eval and in training
runner    many cases, each in a process of its own, forked from one that has imported everything
table     docs/coverage.md
"""
