"""`flexbatch bench`: flexbatch and its peers on the same work, in turn, in fresh processes, under one memory limit.

The parent process stays small and loads no torch: what a child uses, down to the pages of its libraries, is charged to
the child. `worker` is the child; `engines` holds one module for each engine.
"""
