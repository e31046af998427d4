"""Past one process: fewstep's students on servers that others built. Floor 5.

`triton_repository` writes a model repository for Triton server, `triton_model` is what runs in it, and `triton_server`
makes an environment for a server on this machine, starts it, and holds its answers against the engine's.
"""
