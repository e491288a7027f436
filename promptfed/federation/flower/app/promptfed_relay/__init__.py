"""What runs in Flower's processes: relays of bytes. It imports flwr and the standard library, never promptfed or torch.

Every module here is started in a process of its own (or by Flower), so what is imported is paid at each start.
"""
