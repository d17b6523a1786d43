"""Real clients against real servers: `make clients` runs their calls, and writes the table of `docs/clients.md`.

`rows.toml` lists the clients. `served.py` starts three servers, one of them `full.py`, and has `LLM` compute the
values; `call.py` compares what a client returns with them, in an environment that does not have Cenote. The calls
themselves are in `calls/` (Python, and HTTP bodies as YAML) and in `js/`. `refusals.py` has the bad requests of each,
and `needs.py` what calls show beyond a right answer.
"""
