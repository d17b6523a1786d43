"""How work is batched and run. `cenote/vllm/engine` adds to it a module that scripts for vLLM import."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
