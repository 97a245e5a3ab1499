"""What `python -m benchmarks.first_run` is made of.

kept.py       the file of results: a row as soon as there is one, valid for the code that it was made with
pool.py       processes that share out a list of items, and are killed and replaced when one of them hangs or dies
worker.py     the same from inside of such a process
plugin.py     such a process that runs tests
machine.py    such a process that tells what the device is and reaches, and tries one forward pass on it
variants.py   such a process that checks or times kernels in one configuration after the other
predicted.py  what the static model says of these
advice.py     what to do next
"""
