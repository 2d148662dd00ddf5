"""Looking inside a model: which experts speak, what the router thinks, what an answer depends on.

`routing` counts experts by layer, modality and kind of token, `explain` takes one question apart,
`saliency` and `deletion` say which patches an answer depends on and whether that is true,
`geometry` takes patches back to the picture. All of it are functions on arrays that a notebook can
call; `python -m medmoe_jax.analyse` is the command.
"""
