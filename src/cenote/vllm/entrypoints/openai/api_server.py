"""`python -m cenote.entrypoints.openai.api_server` is `cenote serve`, as of vLLM and FastDeploy."""

import sys

from cenote.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
