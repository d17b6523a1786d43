"""Pictures behind URLs that a request waits for, before it is rendered.

They are waited for by threads of their own, a few for each request, so that neither a slow host nor a request with many
URLs holds up what needs none.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from cenote.errors import BadRequest, Unfetched
from cenote.pipeline.fetching import PARAM

if TYPE_CHECKING:
    from cenote.pipeline.fetching import Unarrived

FETCHERS = ThreadPoolExecutor(32, thread_name_prefix="cenote-fetch")
AT_ONCE = 4
"""Pictures of a request that are fetched at a time."""
MOST_SECONDS = 30.0
"""Seconds in which all pictures of a request have to arrive."""
MOST_BYTES = 256 << 20
"""Bytes of all pictures of a request."""


async def fetch(order: Unarrived, files: dict[str, bytes]) -> None:
    """Put the files behind the URLs of `order` into `files`.

    Raises:
        BadRequest: one of them may not be fetched, or there are too many bytes.
        Unfetched: one of them does not arrive, or not in time.
    """
    turn = asyncio.Semaphore(AT_ONCE)
    loop = asyncio.get_running_loop()
    size = sum(map(len, files.values()))

    async def arrive(url: str) -> None:
        nonlocal size
        async with turn:
            files[url] = await loop.run_in_executor(FETCHERS, order.fetch, url)
        size += len(files[url])
        if size > MOST_BYTES:
            raise BadRequest(
                f"the pictures of a request behind URLs have more than {MOST_BYTES} bytes; send fewer at a time",
                param=PARAM,
            )

    tasks = [loop.create_task(arrive(url)) for url in order.urls]
    try:
        async with asyncio.timeout(MOST_SECONDS):
            await asyncio.gather(*tasks)
    except TimeoutError:
        raise Unfetched(
            f"the pictures of a request have not arrived within {MOST_SECONDS:g} seconds", param=PARAM
        ) from None
    finally:
        for task in tasks:
            task.cancel()
