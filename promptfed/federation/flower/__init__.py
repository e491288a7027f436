"""Tasks and replies over Flower's Deployment Engine. Needs the extra `flower`; nothing else in promptfed imports it.

The server: `transport.FlowerTransport`, a `promptfed.federation.server.Transport`. A client: `node.serve_node`.
"""
