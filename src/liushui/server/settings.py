"""Settings of the server beside the engine's. Command-line flags are generated from these fields."""

from dataclasses import dataclass, fields
from ipaddress import ip_address
from typing import Literal, get_args
from urllib.parse import urlsplit

from liushui.errors import ParameterError

Compat = Literal["none", "vllm"]
LogFormat = Literal["text", "json"]
_CHOICES = {"metrics_compat": Compat, "log_format": LogFormat}
_POSITIVE = ("max_body_mib", "body_timeout", "write_timeout", "drain_timeout")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the server listens and whom it answers. `validate()` raises `ParameterError` naming the field."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own needs an API key."""
    port: int = 8000
    """Port to listen on; 0: one that is free."""
    api_key: tuple[str, ...] = ()
    """A key that clients must send as Bearer token. May be repeated. (Seen by `ps`: a key file is better.)"""
    api_key_file: str | None = None
    """TOML file of keys with names and quotas; see docs/serving.md."""
    max_body_mib: float = 8.0
    """Largest request body in MiB."""
    body_timeout: float = 30.0
    """Seconds a client may take to send its request."""
    write_timeout: float = 60.0
    """Seconds a client may leave a part of its answer unread before it is given up."""
    drain_timeout: float = 300.0
    """Seconds that answers under way may take after the signal to stop."""
    metrics_compat: Compat = "none"
    """vllm: /metrics has vLLM's names besides our own."""
    log_format: LogFormat = "text"
    """One line a request, as text or JSON, on standard error."""
    otlp_traces_endpoint: str | None = None
    """Send an OpenTelemetry span for each request to this collector, such as http://127.0.0.1:4318/v1/traces
    (OTLP over HTTP; a URL without a path gets this one). Needs liushui[otel]."""

    def validate(self) -> "ServerConfig":
        for name, literal in _CHOICES.items():
            if getattr(self, name) not in get_args(literal):
                choices = ", ".join(get_args(literal))
                raise ParameterError(name, f"must be one of {choices}, got {getattr(self, name)!r}")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < 1e6:
                raise ParameterError(name, f"must be a positive number, got {getattr(self, name)!r}")
        if not 0 <= self.port < 65536:
            raise ParameterError("port", f"must be in [0, 65535], got {self.port}")
        if self.otlp_traces_endpoint is not None:
            _check_endpoint("otlp_traces_endpoint", self.otlp_traces_endpoint)
        if not self.keyed and not is_loopback(self.host):
            raise ParameterError(
                "host",
                f"{self.host} can be reached from other machines, and without a key anybody there could use the "
                "server; give --api-key-file (or --api-key), or listen on 127.0.0.1",
            )
        return self

    @property
    def keyed(self) -> bool:
        return bool(self.api_key or self.api_key_file)

    @property
    def max_body(self) -> int:
        """Bytes."""
        return int(self.max_body_mib * 2**20)

    @property
    def traces_url(self) -> str | None:
        """Where spans go."""
        if self.otlp_traces_endpoint is None:
            return None
        parts = urlsplit(self.otlp_traces_endpoint)
        return (parts if parts.path.strip("/") else parts._replace(path="/v1/traces")).geturl()

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))


def _check_endpoint(field: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isprintable() or " " in url:
        raise ParameterError(field, f"must be a URL such as http://127.0.0.1:4318/v1/traces, got {url!r}")
    try:
        import opentelemetry.exporter.otlp.proto.http
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError:
        what = "needs OpenTelemetry's SDK, which is not installed; pip install 'liushui[otel]'"
        raise ParameterError(field, what) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address. A name counts only if it is localhost: others may change."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
