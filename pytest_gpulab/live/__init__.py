"""The embedded cluster in real time, in one process: its API, a real HTTP server behind each GPU pod, and the edge.

Times of the cluster (boot, image pull, scrapes) can be sped up; requests never are.
"""
