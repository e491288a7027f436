"""Tasks and replies over Flower's Deployment Engine. Needs the extra `flower`; nothing else in promptfed imports it.

The server: `transport.FlowerTransport`, a `promptfed.federation.server.Transport`. A client: `node.serve_node`.
"""

from importlib.util import find_spec

from promptfed.errors import ConfigError

if find_spec("flwr") is None or find_spec("cryptography") is None:
    raise ConfigError("a federation over a network needs Flower: make .venv-flower/setup.done (docs/deploy.md)")
