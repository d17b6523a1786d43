"""Modules of vLLM's that scripts import and Cenote has elsewhere, each a few lines of names.

The folder lies on `cenote`'s path, so `cenote.utils.argparse_utils` is `utils/argparse_utils.py` here: a script written
for vLLM runs with `cenote` in place of `vllm`. Modules that both have by one name, as `cenote.config` and
`cenote.outputs`, are not repeated.
"""
