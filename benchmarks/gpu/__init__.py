"""All measurements that need a GPU.

One command runs them: `python -m benchmarks.gpu [PART ...]`. A GPU may be available
for a few minutes only. So every part keeps a time budget and writes each row as soon as
it is known. Each row runs in its own process, so that a row that crashes, hangs or runs
out of memory does not stop the others.
"""
