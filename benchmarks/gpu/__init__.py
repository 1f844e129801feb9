"""Everything that wants a GPU, by one command: python -m benchmarks.gpu [PART ...].

A GPU may be at hand for minutes only. So every part keeps a time budget, writes each
row as soon as it is known, and runs each row in a process of its own: a row that
crashes, hangs or runs out of memory costs itself alone.
"""
