"""Where a model comes from: a folder, the hub, another published form that is imported once, or dummy weights."""
