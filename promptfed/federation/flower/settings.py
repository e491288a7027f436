"""Where the server listens, and which key is whose."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from promptfed.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """Where clients reach a server that runs Flower itself, and how the two know each other.

    ``clients`` binds each client id to a file with its public key (OpenSSH, a NIST curve): only these take part, each
    as itself. ``insecure`` is plain text without keys: a client is who it says it is.
    """

    address: str
    certificate: Path | None = None
    private_key: Path | None = None
    clients: Mapping[str, Path] = field(default_factory=dict)
    insecure: bool = False

    def __post_init__(self) -> None:
        split_address(self.address, "network.listen")
        if self.insecure:
            if self.certificate or self.private_key or self.clients:
                raise ConfigError("network.insecure goes with no certificate and no client keys; drop one or the other")
            return
        if not (self.certificate and self.private_key and self.clients):
            raise ConfigError(
                "a server needs a certificate, its private key and the public keys of its clients; for plain text on "
                "a machine of your own set network.insecure"
            )
        check_files(self.certificate, self.private_key, *self.clients.values())
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.private_key)
        except (ssl.SSLError, OSError):
            raise ConfigError(
                f"{self.certificate} and {self.private_key} are no certificate and its private key (both PEM)"
            ) from None

    @property
    def host(self) -> str:
        """The host part; an IPv6 address without its brackets."""
        return split_address(self.address, "network.listen")[0]

    @property
    def port(self) -> int:
        """The port part."""
        return split_address(self.address, "network.listen")[1]

    @property
    def local(self) -> bool:
        """Whether it is reached, among others, at 127.0.0.1."""
        try:
            return str(ipaddress.ip_address(self.host)) in ("127.0.0.1", "0.0.0.0")  # noqa: S104 a comparison
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """A Flower deployment that others run. They submit the app (`flwr run`); the engine waits for its relay.

    ``clients`` binds ids to keys as in `Listen`; ``insecure`` believes what nodes say, and leaves it to that deployment
    who gets in.
    """

    clients: Mapping[str, Path] = field(default_factory=dict)
    insecure: bool = False

    def __post_init__(self) -> None:
        if self.insecure == bool(self.clients):
            raise ConfigError("give the public keys of the clients, or set network.insecure to believe what nodes say")
        check_files(*self.clients.values())


def client_keys(clients: Mapping[str, Path]) -> dict[str, str]:
    """Client ids by their public key, in the form in which Flower tells a node's. Raises ConfigError for a file that
    holds none, and for a key that two clients share."""
    found: dict[str, str] = {}
    for client, path in sorted(clients.items()):
        try:
            key = load_ssh_public_key(path.read_bytes())
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ConfigError(f"client {client!r}: {path} holds no public key of an elliptic curve in OpenSSH's form")
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")
        if pem in found:
            raise ConfigError(f"clients {found[pem]!r} and {client!r} have the same key; each needs its own")
        found[pem] = client
    return found


def check_node_files(private_key: Path | None, root_certificates: Path | None) -> None:
    """Raises ConfigError for a file that is missing or holds something else."""
    check_files(private_key, root_certificates)
    if private_key is not None:
        try:
            key: object = load_ssh_private_key(private_key.read_bytes(), None)
        except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a passphrase
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{private_key} holds no private key of an elliptic curve in OpenSSH's form, unencrypted")
    if root_certificates is not None:
        try:
            ssl.create_default_context(cafile=root_certificates)
        except ssl.SSLError:
            raise ConfigError(f"{root_certificates} holds no certificates (PEM)") from None


def split_address(address: str, what: str) -> tuple[str, int]:
    """Host (without brackets) and port. Raises ConfigError naming ``what``."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"{what}: expected HOST:PORT, got {address!r}")
    return host.strip("[]"), int(port)


def check_files(*paths: Path | None) -> None:
    """Raises ConfigError for the first that is not a file."""
    for path in paths:
        if path is not None and not path.is_file():
            raise ConfigError(f"no such file: {path}")
