"""The plugin from Python, with the embedded all-MiniLM-L6-v2: `offline.py [FILE]` prints the chunks of a text."""

from __future__ import annotations

import sys
from pathlib import Path

from cenote import LLM

TEXT = """\
A cenote is a natural pit in limestone. It forms where the roof of a cave collapses and shows the groundwater below. \
The groundwater of these caves is clear and cold. \
My sister bakes bread every Sunday. The dough rests for a night before she puts it into the oven. \
Interest rates rose again in March. Banks passed the higher rates on to their customers.
"""

text = Path(sys.argv[1]).read_text() if len(sys.argv) > 1 else TEXT
with LLM(io_processor_plugin="semantic-chunks") as llm:
    request = {"data": {"text": text}}
    (output,) = llm.encode(request, pooling_task="plugin", use_tqdm=False)
for chunk in output.outputs.chunks:
    print(f"{chunk.start:6}{chunk.end:6}  {chunk.text.strip()}")
