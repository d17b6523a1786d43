"""One file per library, run by `worker.py` in that library's environment: nothing here may import the rest of Cenote.

A file defines `load(task, folder, variant, threads)`. It returns what answers orders of the task:

    embed     texts -> vectors, (N, D)
    rerank    (query, documents) -> scores in 0 .. 1, (N,)
    colbert   texts -> one (tokens, D) per document

`export(task, folder, target, variant)`, where there is one, writes the model in the form that the library runs.
"""
