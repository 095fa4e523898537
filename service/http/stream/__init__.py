"""`POST /v1/predict/stream`: a job of any number of texts on one connection.

Start with `route`: it opens a `Job`, which reads lines (`lines`), makes portions of them
(`portions`) and answers them in order.
"""
