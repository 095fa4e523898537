"""The web console: its routes, and its files as they are sent. Pages are plain modules in static/.

The console shows what the API answers, and adds nothing of its own to it.
"""
