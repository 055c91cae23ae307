"""Without FastAPI, httpx or aiohttp there is nothing to test."""

from importlib.util import find_spec

collect_ignore_glob = [] if all(map(find_spec, ("fastapi", "httpx", "aiohttp"))) else ["test_*.py"]
