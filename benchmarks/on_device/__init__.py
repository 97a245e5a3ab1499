"""What `python -m benchmarks.gpu` is made of.

cases.py      what is measured, in which order
machine.py    the device: its clock, its memory, its name
variants.py   attention as it is spelled in each variant, and what SDPA and FlexAttention are given instead
problem.py    the inputs of a case, its contenders, and its results in float64
dense.py decode.py jagged.py   problems of each kind
measure.py    one case: every contender checked, then all of them timed in turns
warming.py    compiled code of cases to come, made in processes side by side
figures.py    goals, the table and the plots
"""
