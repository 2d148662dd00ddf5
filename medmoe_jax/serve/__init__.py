"""A server that any client of OpenAI's chat completions can ask: `python -m medmoe_jax.serve`.

`app.py` has the addresses, `messages.py` turns what is sent into a prompt, `batching.py` answers
what waits together, `replies.py` writes the answers. Not for clinical use.
"""
