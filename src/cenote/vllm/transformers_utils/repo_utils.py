"""The hub's own client."""

from huggingface_hub import HfApi as hf_api

__all__ = ["hf_api"]
