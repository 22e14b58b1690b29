"""flexbatch inside other programs: a session for one's own Python, a backend of lm-eval, a runner of HELM.

Nothing is imported here: HELM's environment has none of what the engine needs.
"""
