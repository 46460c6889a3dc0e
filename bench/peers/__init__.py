"""Other engines' shortest way to one token, each run by its own interpreter, never imported here.

A driver is given a model's folder and prints one JSON line at each moment it reaches, as
`{"moment": "imported"}`; the last is `first_token`. It keeps no clock: who started it does.
"""
