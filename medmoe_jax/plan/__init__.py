"""What a phase needs on hardware that is not there: `python -m medmoe_jax.plan`.

`targets.py` describes devices to the compiler, `programs.py` compiles the programs that training
and generation run, `hlo.py` reads what they do, `estimate.py` holds it against the chip's published
figures, `search.py` tries meshes, batches and rematerialisation, `report.py` prints.
"""
